"""A worker whose steps wait until the graph has asked for the computed blocks of open prompts.

So the blocks of a prompt are sent while it is computed, however fast steps are and however slowly
messages travel.
"""

from collections.abc import Callable
from typing import Any

import trio

from sagellm.opening import worker_main
from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.runtime.engine.loop import EngineLoop
from sagellm.runtime.kv.transport import BlockLocation, KVChunk
from sagellm.runtime.messages import LeaseRef

LONGEST_S = 20.0  # that a step waits; then the worker fails


class Offers:
    """The computed blocks of prompts that the graph has not asked for yet."""

    def __init__(self) -> None:
        self._due: dict[str, int] = {}  # by request, the number of computed blocks
        self._asked = trio.Event()

    def computed(self, request_id: str, num_blocks: int) -> None:
        if num_blocks:
            self._due[request_id] = num_blocks

    def asked(self, request_id: str, end: int) -> None:
        if end >= self._due.get(request_id, 0):
            self._due.pop(request_id, None)
        self._asked.set()

    async def all_asked(self) -> None:
        with trio.fail_after(LONGEST_S):
            while self._due:
                self._asked = trio.Event()
                await self._asked.wait()


def main() -> None:
    offers = Offers()
    launch, export_chunk = EngineLoop._launch, LocalEngine.export_chunk
    report_kv_progress = LocalEngine.report_kv_progress

    async def patient(self: EngineLoop, batch: Any) -> Any:
        await offers.all_asked()
        return await launch(self, batch)

    async def noted(self: LocalEngine, lease: LeaseRef, chunk: KVChunk) -> BlockLocation:
        offers.asked(lease.request_id, chunk.end)
        return await export_chunk(self, lease, chunk)

    def reported(self: LocalEngine, report: Callable[[LeaseRef, int], None]) -> None:
        def both(lease: LeaseRef, num_blocks: int) -> None:
            offers.computed(lease.request_id, num_blocks)
            report(lease, num_blocks)

        report_kv_progress(self, both)

    EngineLoop._launch = patient  # type: ignore[method-assign]
    LocalEngine.export_chunk = noted  # type: ignore[method-assign]
    LocalEngine.report_kv_progress = reported  # type: ignore[method-assign]
    worker_main.main()


if __name__ == "__main__":
    main()
