"""Both ends of a transfer between two workers, as the graph holds them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import trio

from sagellm.runtime.comm.protocol import (
    Done,
    Export,
    Exported,
    Hold,
    Idle,
    Import,
    Landing,
    Receive,
    Release,
    Submit,
)
from sagellm.runtime.engine.port import KVSource
from sagellm.runtime.kv.located import Located
from sagellm.runtime.messages import LeaseRef

LEASE_S = 10.0  # an exported lease ends then, where its receiver does not say that it goes on

Question: TypeAlias = Callable[[int], Submit | Import | Export | Receive | Idle]


class Asked(Protocol):
    """What an end needs of its engine."""

    async def ask(
        self, question: Question, meanwhile: Callable[[], None] | None = None
    ) -> Done | Landing | Exported: ...

    def say(self, message: Release | Hold) -> None: ...

    def cancel(self, request_id: str, choice: int, epoch: int) -> None: ...


@dataclass(frozen=True, slots=True)
class RemoteSource:
    """The sending side of a transfer. Its worker is asked when the receiver begins."""

    engine: Asked
    lease: LeaseRef

    async def locate(self) -> Located:
        """Where the blocks are; from now on they are `sending`. Raises StaleLease, EngineLost."""
        with trio.CancelScope(shield=True):
            answer = await self.engine.ask(lambda call: Export(call=call, lease=self.lease))
        assert isinstance(answer, Exported)
        return answer.source

    def hold(self) -> None:
        """The transfer goes on: the lease is not to end."""
        self.engine.say(Hold(lease=self.lease))

    def release(self) -> None:
        self.engine.say(Release(lease=self.lease))


@dataclass(frozen=True, slots=True)
class RemoteTarget:
    """The receiving side: its worker copies, from where the sender's worker says the blocks are."""

    engine: Asked
    lease: LeaseRef

    async def receive(self, source: KVSource) -> None:
        if not isinstance(source, RemoteSource):
            raise TypeError(f"a worker receives from a worker, not from {type(source).__name__}")
        try:
            located = await source.locate()
            await self.engine.ask(
                lambda call: Receive(call=call, lease=self.lease, source=located), source.hold
            )
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        lease = self.lease
        self.engine.cancel(lease.request_id, lease.choice, lease.epoch)
