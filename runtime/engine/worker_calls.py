"""Both ends of a transfer between two workers, as the graph holds them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import trio

from sagellm.runtime.comm.protocol import (
    BlocksReserved,
    Done,
    Export,
    ExportChunk,
    Exported,
    Idle,
    Import,
    Receive,
    ReceiveChunk,
    Release,
    RenewLease,
    Submit,
)
from sagellm.runtime.kv.transport import BlockLocation
from sagellm.runtime.messages import LeaseRef
from sagellm.runtime.port import KVSource

LEASE_S = 10.0  # an exported lease ends then, where its receiver does not say that it goes on

Question: TypeAlias = Callable[
    [int], Submit | Import | Export | ExportChunk | Receive | ReceiveChunk | Idle
]


class Prefetches(Protocol):
    """Moves blocks of prompts before they are whole; see `prefetching`."""

    async def settle(self, lease: LeaseRef) -> int:
        """Stop; how many of the blocks that are reserved there have come already."""


class Asked(Protocol):
    """What an end needs of its engine."""

    async def ask(
        self, question: Question, meanwhile: Callable[[], None] | None = None
    ) -> Done | BlocksReserved | Exported: ...

    def say(self, message: Release | RenewLease) -> None: ...

    def cancel(self, request_id: str, choice: int, epoch: int) -> None: ...


@dataclass(frozen=True, slots=True)
class RemoteSource:
    """The sending side of a transfer. Its worker is asked when the receiver begins."""

    engine: Asked
    lease: LeaseRef

    async def locate(self, num_received: int = 0) -> BlockLocation:
        """Where the blocks are, but for the first, which have landed; from now on they are
        `sending`. Raises StaleLease, EngineLost.
        """
        with trio.CancelScope(shield=True):
            answer = await self.engine.ask(
                lambda call: Export(call=call, lease=self.lease, num_received=num_received)
            )
        assert isinstance(answer, Exported)
        return answer.source

    def hold(self) -> None:
        """The transfer goes on: the lease is not to end."""
        self.engine.say(RenewLease(lease=self.lease))

    def release(self) -> None:
        self.engine.say(Release(lease=self.lease))


@dataclass(frozen=True, slots=True)
class RemoteTarget:
    """The receiving side: its worker copies, from where the sender's worker says the blocks are."""

    engine: Asked
    lease: LeaseRef
    prefetcher: "Prefetches | None" = None

    async def receive(self, source: KVSource) -> None:
        if not isinstance(source, RemoteSource):
            raise TypeError(f"a worker receives from a worker, not from {type(source).__name__}")
        try:
            num_received = await self.prefetcher.settle(self.lease) if self.prefetcher else 0
            located = await source.locate(num_received)
            await self.engine.ask(
                lambda call: Receive(
                    call=call, lease=self.lease, source=located, num_received=num_received
                ),
                source.hold,
            )
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        lease = self.lease
        self.engine.cancel(lease.request_id, lease.choice, lease.epoch)
