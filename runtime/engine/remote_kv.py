"""KV transfers between two workers, driven from the graph's process.

A transfer copies the blocks of a computed prompt into blocks that another engine has reserved. A
prefetch copies chunks of a prompt into these blocks while later chunks are still being computed.
The transfer then copies the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import trio

from sagellm.runtime.comm.protocol import (
    BlocksReserved,
    Export,
    ExportChunk,
    Exported,
    Import,
    KVProgress,
    Receive,
    ReceiveChunk,
    Release,
    RenewLease,
)
from sagellm.runtime.engine.remote_engine import RemoteEngine
from sagellm.runtime.engine.worker_calls import WorkerCalls
from sagellm.runtime.kv.lease import Fence
from sagellm.runtime.kv.transport import BlockLocation, KVChunk
from sagellm.runtime.messages import LeaseRef
from sagellm.runtime.port import (
    DamagedBlocks,
    EngineFacts,
    EngineLost,
    EngineRefusal,
    KVSource,
    LeaseOffer,
    LossCause,
    StaleLease,
    has_kv_transfer,
)

_SILENT_S = 1.0  # if a chunk takes longer to fail, the rest is left to the transfer


class RemoteKVEngine(RemoteEngine):
    """A remote engine whose KV blocks can move. `prefetcher`, if given, copies chunks of prompts
    that are still being computed.
    """

    def __init__(
        self,
        facts: EngineFacts,
        *,
        name: str,
        replica: int = 0,
        on_change: Callable[[bool], None] = lambda is_up: None,
        prefetcher: "Prefetcher | None" = None,
    ) -> None:
        super().__init__(facts, name=name, replica=replica, on_change=on_change)
        self._prefetcher = prefetcher

    def cancel(self, request_id: str, choice: int, epoch: int) -> None:
        if self._prefetcher is not None:
            self._prefetcher.forget(Fence(request_id, choice, epoch))
        super().cancel(request_id, choice, epoch)

    def export(self, lease: LeaseRef) -> "RemoteSource":
        return RemoteSource(self.calls, lease)

    async def import_(self, offer: LeaseOffer) -> "RemoteTarget":
        try:
            answer = await self.calls.ask(lambda call: Import(call=call, offer=offer))
        except trio.Cancelled:
            # The worker may have reserved the blocks already.
            self.cancel(offer.request_id, offer.choice, offer.epoch)
            raise
        assert isinstance(answer, BlocksReserved)
        if self._prefetcher is not None:
            self._prefetcher.reserved(self, answer.lease)
        return RemoteTarget(self, answer.lease, self._prefetcher)

    def _lose(self, cause: LossCause) -> None:
        super()._lose(cause)
        if self._prefetcher is not None:
            self._prefetcher.lose(self)

    def _take(self, message: object) -> None:
        if not isinstance(message, KVProgress):
            super()._take(message)
        elif self._prefetcher is not None:
            self._prefetcher.progressed(self, message.lease, message.num_blocks)


def remote_engine(
    facts: EngineFacts,
    *,
    name: str,
    replica: int = 0,
    on_change: Callable[[bool], None] = lambda is_up: None,
    prefetcher: "Prefetcher | None" = None,
) -> RemoteEngine:
    """A remote engine with `facts`; a RemoteKVEngine if its KV blocks can move."""
    if not has_kv_transfer(facts):
        return RemoteEngine(facts, name=name, replica=replica, on_change=on_change)
    return RemoteKVEngine(
        facts, name=name, replica=replica, on_change=on_change, prefetcher=prefetcher
    )


@dataclass(frozen=True, slots=True)
class RemoteSource:
    """The sending side of a transfer. Its worker exports the lease when the receiver begins."""

    calls: WorkerCalls
    lease: LeaseRef

    async def locate(self, num_received: int = 0) -> BlockLocation:
        """Export the lease. Return the location of the blocks after the first `num_received`. The
        lease is `sending` from then on. Raises StaleLease, EngineLost.
        """
        with trio.CancelScope(shield=True):
            answer = await self.calls.ask(
                lambda call: Export(call=call, lease=self.lease, num_received=num_received)
            )
        assert isinstance(answer, Exported)
        return answer.source

    def hold(self) -> None:
        """Renew the exported lease: the transfer still runs."""
        self.calls.say(RenewLease(lease=self.lease))

    def release(self) -> None:
        self.calls.say(Release(lease=self.lease))


@dataclass(frozen=True, slots=True)
class RemoteTarget:
    """The receiving side of a transfer: its worker copies the sender's blocks."""

    engine: RemoteKVEngine
    lease: LeaseRef
    prefetcher: "Prefetcher | None" = None

    async def receive(self, source: KVSource) -> None:
        if not isinstance(source, RemoteSource):
            raise TypeError(f"a worker receives from a worker, not from {type(source).__name__}")
        try:
            num_received = await self.prefetcher.settle(self.lease) if self.prefetcher else 0
            located = await source.locate(num_received)
            await self.engine.calls.ask(
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


@dataclass(slots=True)
class _Prefetch:
    """The prefetch of one prompt into `reservation`. `source`: the engine that computes the prompt,
    the prompt's lease in that engine, and its number of computed blocks. `moving`: an event that is
    set when copying stops; None if no chunk is being copied. `is_settled`: no more chunks are
    copied.
    """

    target: RemoteKVEngine
    reservation: LeaseRef
    source: tuple[RemoteKVEngine, LeaseRef, int] | None = None
    num_received: int = 0
    is_settled: bool = False
    moving: trio.Event | None = None


class Prefetcher:
    """Copies chunks of prompts that are still being computed, in tasks of `nursery`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._prefetches: dict[Fence, _Prefetch] = {}

    def reserved(self, engine: RemoteKVEngine, lease: LeaseRef) -> None:
        """Record that `engine` has reserved blocks for a prompt."""
        self._prefetches.setdefault(_fence(lease), _Prefetch(engine, lease))

    def progressed(self, engine: RemoteKVEngine, lease: LeaseRef, num_blocks: int) -> None:
        """Start to copy the first `num_blocks` blocks of a prompt, which `engine` has computed.
        These blocks do not change any more.
        """
        prefetch = self._prefetches.get(_fence(lease))
        # None: no other engine has reserved blocks. Settled: the transfer has begun.
        if prefetch is None or prefetch.is_settled:
            return
        prefetch.source = engine, lease, num_blocks
        if prefetch.moving is None:
            prefetch.moving = trio.Event()
            self._nursery.start_soon(self._move, prefetch)

    async def settle(self, lease: LeaseRef) -> int:
        """Stop the prefetch into a reserved lease. Return the number of blocks that it has
        received.
        """
        fence = _fence(lease)
        prefetch = self._prefetches.get(fence)
        if prefetch is None:
            return 0
        prefetch.is_settled = True
        if prefetch.moving is not None:  # `num_received` may still grow until then
            await prefetch.moving.wait()
        self._prefetches.pop(fence, None)
        return prefetch.num_received

    def forget(self, fence: Fence) -> None:
        """Stop the prefetch of a prompt that will not be transferred."""
        prefetch = self._prefetches.pop(fence, None)
        if prefetch is not None:
            prefetch.is_settled = True

    def lose(self, engine: RemoteEngine) -> None:
        """Stop the prefetches into `engine`, which is lost with its reserved blocks."""
        for fence, prefetch in tuple(self._prefetches.items()):
            if prefetch.target is engine:
                self.forget(fence)

    async def _move(self, prefetch: _Prefetch) -> None:
        """Copy chunk after chunk until all computed blocks have arrived. A chunk that fails is left
        to the transfer.
        """
        try:
            while prefetch.source is not None and not prefetch.is_settled:
                engine, lease, num_blocks = prefetch.source
                if num_blocks <= prefetch.num_received:
                    prefetch.source = None
                    continue
                begun_s = trio.current_time()
                chunk = KVChunk(first=prefetch.num_received, end=num_blocks)
                try:
                    await _move_chunk(prefetch, engine, lease, chunk)
                except (StaleLease, DamagedBlocks, EngineLost, EngineRefusal):
                    if trio.current_time() - begun_s > _SILENT_S:
                        prefetch.is_settled = True
                    if prefetch.source == (engine, lease, num_blocks):  # nothing newer is computed
                        prefetch.source = None
        finally:
            assert prefetch.moving is not None
            prefetch.moving.set()
            prefetch.moving = None


async def _move_chunk(
    prefetch: _Prefetch, engine: RemoteKVEngine, lease: LeaseRef, chunk: KVChunk
) -> None:
    answer = await engine.calls.ask(lambda call: ExportChunk(call=call, lease=lease, chunk=chunk))
    assert isinstance(answer, Exported)
    await prefetch.target.calls.ask(
        lambda call: ReceiveChunk(
            call=call, lease=prefetch.reservation, source=answer.source, chunk=chunk
        )
    )
    prefetch.num_received = chunk.end


def _fence(lease: LeaseRef) -> Fence:
    return Fence(lease.request_id, lease.choice, lease.epoch)
