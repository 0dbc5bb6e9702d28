"""A worker that dies in the middle of sending KV blocks: once, of all workers of one graph."""

import os
import signal
from collections.abc import Callable, Sequence

from sagellm import worker
from sagellm.runtime.kv.wire import Wire, anything

SHARE, FLAG = "SAGELLM_TEST_DIE_AT", "SAGELLM_TEST_DIED"  # of a chunk's bytes; a file's name


def main() -> None:
    send, share = Wire.send, float(os.environ[SHARE])

    async def deadly(
        self: Wire, views: Sequence[bytes | memoryview], check: Callable[[], None] = anything
    ) -> None:
        if check is not anything and _is_first():
            head, seal, *blocks = views
            whole = b"".join(blocks)
            await send(self, [head, seal, whole[: int(share * len(whole))]], check)
            os.kill(os.getpid(), signal.SIGKILL)
        await send(self, views, check)

    Wire.send = deadly  # type: ignore[method-assign]
    worker.main()


def _is_first() -> bool:
    try:
        os.close(os.open(os.environ[FLAG], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    main()
