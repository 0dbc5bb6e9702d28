"""Calls to the worker of an engine replica: questions, each of which the worker answers once, and
notices, which have no answer.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

import trio

from sagellm.runtime.comm.channel import Channel, ChannelClosed
from sagellm.runtime.comm.protocol import (
    BlocksReserved,
    Cancel,
    Done,
    Drop,
    Export,
    ExportChunk,
    Exported,
    Grant,
    GrantCacheUpdate,
    Idle,
    Import,
    Receive,
    ReceiveChunk,
    Refused,
    Release,
    RenewLease,
    Submit,
    SyncCache,
)
from sagellm.runtime.port import DamagedBlocks, EngineLost, EngineRefusal, LossCause, StaleLease

LEASE_S = 10.0  # an exported lease ends after this time, unless its receiver renews it

Question: TypeAlias = Callable[
    [int], Submit | Import | Export | ExportChunk | Receive | ReceiveChunk | Idle
]
Notice: TypeAlias = Cancel | Release | RenewLease | Grant | SyncCache | GrantCacheUpdate | Drop


@dataclass(slots=True)
class _Call:
    """A question that has no answer yet. `done` is set when `answer` has come, or when the worker
    is lost; then `cause` is the cause of the loss.
    """

    done: trio.Event = field(default_factory=trio.Event)
    answer: Done | BlocksReserved | Exported | Refused | None = None
    cause: LossCause = "none"


class WorkerCalls:
    """Sends to the worker of one replica over `channel`, which is None while no worker runs."""

    def __init__(self, name: str, replica: int) -> None:
        self.channel: Channel | None = None
        self._name = name
        self._replica = replica
        self._numbers: Iterator[int] = itertools.count()
        self._calls: dict[int, _Call] = {}

    def require(self) -> Channel:
        """The channel. Raises EngineLost if no worker runs."""
        if self.channel is None:
            raise EngineLost(self._name, self._replica)
        return self.channel

    def say(self, message: Notice) -> None:
        """Send a notice. It is dropped if the worker is gone."""
        if self.channel is not None:
            # The task that receives from the channel reports the loss.
            with suppress(ChannelClosed):
                self.channel.put(message)

    async def ask(
        self, question: Question, meanwhile: Callable[[], None] | None = None
    ) -> Done | BlocksReserved | Exported:
        """Send the message `question(call number)`, and return its answer. Raises EngineLost, and
        the exception that the worker raised. Until the answer comes, `meanwhile` is called every
        third of LEASE_S.

        A cancellation is sent to the worker, and delivered after its answer: until then the worker
        may read or write blocks that the caller is about to free.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        channel, number = self.require(), next(self._numbers)
        call = self._calls[number] = _Call()
        try:
            channel.put(question(number))
        except ChannelClosed:
            del self._calls[number]
            raise EngineLost(self._name, self._replica) from None
        try:
            while meanwhile is not None and not call.done.is_set():
                with trio.move_on_after(LEASE_S / 3):
                    await call.done.wait()
                    break
                meanwhile()
            await call.done.wait()
        except trio.Cancelled:
            self.say(Drop(call=number))
            with trio.CancelScope(shield=True):
                await call.done.wait()
            raise
        if call.answer is None:
            raise EngineLost(self._name, self._replica, cause=call.cause)
        if isinstance(call.answer, Refused):
            raise _raised(call.answer)
        return call.answer

    def take_answer(self, answer: Done | BlocksReserved | Exported | Refused) -> None:
        """Pass an answer of the worker to the call that waits for it."""
        call = self._calls.pop(answer.call, None)
        if call is not None:
            call.answer = answer
            call.done.set()

    def lose(self, cause: LossCause) -> None:
        """End all open calls, because the worker is lost."""
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.cause = cause
            call.done.set()


def _raised(refused: Refused) -> Exception:
    """The exception that a call raised in the worker."""
    if refused.kind == "stale":
        return StaleLease(refused.error)
    if refused.kind == "damaged":
        return DamagedBlocks(refused.error)
    return EngineRefusal(refused.error, refused.code)
