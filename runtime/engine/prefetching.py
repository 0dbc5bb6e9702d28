"""Blocks of prompts that are still being computed, on their way to where they will be decoded.

A worker tells how far it has come with a prompt, step by step; what is computed is copied into the
blocks that are reserved for it elsewhere, while the rest is computed. What is left at the end is
for the transfer itself.
"""

from dataclasses import dataclass

import trio

from sagellm.runtime.comm.protocol import Exported, ExportPart, ReceivePart
from sagellm.runtime.engine.remote_transfer import Asked
from sagellm.runtime.kv.lease import Fence
from sagellm.runtime.kv.part import Part
from sagellm.runtime.messages import LeaseRef
from sagellm.runtime.port import DamagedBlocks, EngineLost, EngineRefusal, StaleLease

_SILENT_S = 1.0  # a part that takes longer to fail is the last one: the transfer has the rest


@dataclass(slots=True)
class _Flight:
    """One prompt. `source`: who computes it, and how many of its blocks there are by now."""

    target: Asked
    landing: LeaseRef
    source: tuple[Asked, LeaseRef, int] | None = None
    num_landed: int = 0
    is_settled: bool = False
    moving: trio.Event | None = None  # set when the part under way has come, or failed


class Prefetcher:
    """Moves blocks while `nursery` runs."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._flights: dict[Fence, _Flight] = {}

    def landing(self, engine: Asked, lease: LeaseRef) -> None:
        """Blocks of that engine are reserved for a prompt."""
        self._flights.setdefault(_fence(lease), _Flight(engine, lease))

    def advanced(self, engine: Asked, lease: LeaseRef, num_blocks: int) -> None:
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
        return flight.num_landed

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

    async def _move(self, flight: _Flight) -> None:
        """Part after part, until it has caught up. A part that fails is left to the transfer."""
        try:
            while flight.source is not None and not flight.is_settled:
                engine, lease, num_blocks = flight.source
                if num_blocks <= flight.num_landed:
                    flight.source = None
                    continue
                begun_s = trio.current_time()
                part = Part(first=flight.num_landed, end=num_blocks)
                try:
                    await _move_part(flight, engine, lease, part)
                except (StaleLease, DamagedBlocks, EngineLost, EngineRefusal):
                    if trio.current_time() - begun_s > _SILENT_S:
                        flight.is_settled = True
                    if flight.source == (engine, lease, num_blocks):  # there is nothing newer
                        flight.source = None
        finally:
            assert flight.moving is not None
            flight.moving.set()
            flight.moving = None


async def _move_part(flight: _Flight, engine: Asked, lease: LeaseRef, part: Part) -> None:
    answer = await engine.ask(lambda call: ExportPart(call=call, lease=lease, part=part))
    assert isinstance(answer, Exported)
    await flight.target.ask(
        lambda call: ReceivePart(call=call, lease=flight.landing, source=answer.source, part=part)
    )
    flight.num_landed = part.end


def _fence(lease: LeaseRef) -> Fence:
    return Fence(lease.request_id, lease.choice, lease.epoch)
