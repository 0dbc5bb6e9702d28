"""KV transfers between worker processes, as the graph's process drives them."""

from collections.abc import Callable
from dataclasses import dataclass

import trio

from sagellm.runtime.comm.protocol import (
    BlocksReserved,
    ExportChunk,
    Exported,
    Import,
    KVProgress,
    ReceiveChunk,
)
from sagellm.runtime.engine.remote_engine import RemoteEngine
from sagellm.runtime.engine.worker_calls import Asked, RemoteSource, RemoteTarget
from sagellm.runtime.kv.lease import Fence
from sagellm.runtime.kv.transport import KVChunk
from sagellm.runtime.messages import LeaseRef
from sagellm.runtime.port import (
    DamagedBlocks,
    EngineFacts,
    EngineLost,
    EngineRefusal,
    LeaseOffer,
    LossCause,
    StaleLease,
    has_kv_transfer,
)

_SILENT_S = 1.0  # a part that takes longer to fail is the last one: the transfer has the rest


@dataclass(slots=True)
class _Prefetch:
    """One prompt. `source`: who computes it, and how many of its blocks there are by now."""

    target: Asked
    reservation: LeaseRef
    source: tuple[Asked, LeaseRef, int] | None = None
    num_received: int = 0
    is_settled: bool = False
    moving: trio.Event | None = None  # set when the part under way has come, or failed


class Prefetcher:
    """Moves blocks while `nursery` runs."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._flights: dict[Fence, _Prefetch] = {}

    def reservation(self, engine: Asked, lease: LeaseRef) -> None:
        """Blocks of that engine are reserved for a prompt."""
        self._flights.setdefault(_fence(lease), _Prefetch(engine, lease))

    def kv_progressed(self, engine: Asked, lease: LeaseRef, num_blocks: int) -> None:
        """So many blocks of a prompt are computed, by that engine, and will not change."""
        flight = self._flights.get(_fence(lease))
        if flight is None or flight.is_settled:  # it is decoded where it is computed
            return
        flight.source = engine, lease, num_blocks
        if flight.moving is None:
            flight.moving = trio.Event()
            self._nursery.start_soon(self._move, flight)

    async def settle(self, lease: LeaseRef) -> int:
        """Stop; how many of the blocks that are reserved there have come already."""
        fence = _fence(lease)
        flight = self._flights.get(fence)
        if flight is None:
            return 0
        flight.is_settled = True
        if flight.moving is not None:
            await flight.moving.wait()
        self._flights.pop(fence, None)
        return flight.num_received

    def forget(self, fence: Fence) -> None:
        """Nobody waits for that prompt any more."""
        flight = self._flights.pop(fence, None)
        if flight is not None:
            flight.is_settled = True

    def lose(self, engine: Asked) -> None:
        """It is gone, with what was reserved there."""
        for fence, flight in tuple(self._flights.items()):
            if flight.target is engine:
                self.forget(fence)

    async def _move(self, flight: _Prefetch) -> None:
        """Part after part, until it has caught up. A part that fails is left to the transfer."""
        try:
            while flight.source is not None and not flight.is_settled:
                engine, lease, num_blocks = flight.source
                if num_blocks <= flight.num_received:
                    flight.source = None
                    continue
                begun_s = trio.current_time()
                chunk = KVChunk(first=flight.num_received, end=num_blocks)
                try:
                    await _move_chunk(flight, engine, lease, chunk)
                except (StaleLease, DamagedBlocks, EngineLost, EngineRefusal):
                    if trio.current_time() - begun_s > _SILENT_S:
                        flight.is_settled = True
                    if flight.source == (engine, lease, num_blocks):  # there is nothing newer
                        flight.source = None
        finally:
            assert flight.moving is not None
            flight.moving.set()
            flight.moving = None


async def _move_chunk(flight: _Prefetch, engine: Asked, lease: LeaseRef, chunk: KVChunk) -> None:
    answer = await engine.ask(lambda call: ExportChunk(call=call, lease=lease, chunk=chunk))
    assert isinstance(answer, Exported)
    await flight.target.ask(
        lambda call: ReceiveChunk(
            call=call, lease=flight.reservation, source=answer.source, chunk=chunk
        )
    )
    flight.num_received = chunk.end


def _fence(lease: LeaseRef) -> Fence:
    return Fence(lease.request_id, lease.choice, lease.epoch)


class RemoteKVEngine(RemoteEngine):
    """`prefetcher`: moves blocks of prompts that are still being computed, if given."""

    def __init__(
        self,
        facts: EngineFacts,
        *,
        name: str,
        replica: int = 0,
        on_change: Callable[[bool], None] = lambda is_up: None,
        prefetcher: Prefetcher | None = None,
    ) -> None:
        super().__init__(facts, name=name, replica=replica, on_change=on_change)
        self._prefetcher = prefetcher

    def cancel(self, request_id: str, choice: int, epoch: int) -> None:
        if self._prefetcher is not None:
            self._prefetcher.forget(Fence(request_id, choice, epoch))
        super().cancel(request_id, choice, epoch)

    def export(self, lease: LeaseRef) -> RemoteSource:
        return RemoteSource(self, lease)

    async def import_(self, offer: LeaseOffer) -> RemoteTarget:
        try:
            answer = await self.ask(lambda call: Import(call=call, offer=offer))
        except trio.Cancelled:
            self.cancel(offer.request_id, offer.choice, offer.epoch)  # it may have had them already
            raise
        assert isinstance(answer, BlocksReserved)
        if self._prefetcher is not None:
            self._prefetcher.reservation(self, answer.lease)
        return RemoteTarget(self, answer.lease, self._prefetcher)

    def _lose(self, cause: LossCause) -> None:
        super()._lose(cause)
        if self._prefetcher is not None:
            self._prefetcher.lose(self)

    def _hear(self, message: object) -> None:
        if not isinstance(message, KVProgress):
            super()._hear(message)
        elif self._prefetcher is not None:
            self._prefetcher.kv_progressed(self, message.lease, message.num_blocks)


def remote_engine(
    facts: EngineFacts,
    *,
    name: str,
    replica: int = 0,
    on_change: Callable[[bool], None] = lambda is_up: None,
    prefetcher: Prefetcher | None = None,
) -> RemoteEngine:
    """The graph's side of an engine with those facts."""
    if not has_kv_transfer(facts):
        return RemoteEngine(facts, name=name, replica=replica, on_change=on_change)
    return RemoteKVEngine(
        facts, name=name, replica=replica, on_change=on_change, prefetcher=prefetcher
    )
