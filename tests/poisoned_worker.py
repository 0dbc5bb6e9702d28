"""A worker that dies of a prompt, or hangs with it, as after a fault in a kernel."""

import os
import signal
from typing import Any

import trio

from sagellm.opening import worker_main
from sagellm.runtime.engine.loop import EngineLoop

POISON, HANG = 13, 14  # as the first token of a prompt


def main() -> None:
    launch = EngineLoop._launch

    async def deadly(self: EngineLoop, batch: Any, *rest: Any) -> Any:
        firsts = {sequence.tokens[0] for sequence in batch.sequences}
        if POISON in firsts:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANG in firsts:
            await trio.sleep_forever()  # its loop lives, and answers when it is asked
        return await launch(self, batch, *rest)

    EngineLoop._launch = deadly  # type: ignore[method-assign]
    worker_main.main()


if __name__ == "__main__":
    main()
