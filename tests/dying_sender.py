"""A worker that dies in the middle of sending KV blocks: one of a graph for each order.

An order is a file with the share of a chunk's bytes that are sent before.
"""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from sagellm.opening import worker_main
from sagellm.runtime.kv.connection import BlockConnection, no_check

ORDER = "SAGELLM_TEST_DIE"  # the file's name


def give_order(path: Path, share: float) -> None:
    """It is there as a whole, or not at all."""
    written = path.with_suffix(".written")
    written.write_text(str(share))
    written.rename(path)


def main() -> None:
    send = BlockConnection.send

    async def deadly(
        self: BlockConnection,
        views: Sequence[bytes | memoryview],
        check: Callable[[], None] = no_check,
    ) -> None:
        if check is not no_check and (share := _take_order()) is not None:
            head, seal, *blocks = views
            whole = b"".join(blocks)
            await send(self, [head, seal, whole[: int(share * len(whole))]], check)
            os.kill(os.getpid(), signal.SIGKILL)
        await send(self, views, check)

    BlockConnection.send = deadly  # type: ignore[method-assign]
    worker_main.main()


def _take_order() -> float | None:
    """Of all workers, the first."""
    order = Path(os.environ[ORDER])
    taken = order.with_suffix(f".{os.getpid()}")
    try:
        order.rename(taken)
    except FileNotFoundError:
        return None
    return float(taken.read_text())


if __name__ == "__main__":
    main()
