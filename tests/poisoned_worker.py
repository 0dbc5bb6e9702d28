"""A worker that dies of a prompt, or hangs with it: the likes of a fault in a kernel."""

import os
import signal
from typing import Any

import trio

from sagellm.opening import worker_main
from sagellm.runtime.engine.loop import Stepping

POISON, HANG = 13, 14  # as the first token of a prompt


def main() -> None:
    run = Stepping.run

    async def deadly(self: Stepping, batch: Any, *rest: Any) -> Any:
        firsts = {sequence.tokens[0] for sequence in batch.sequences}
        if POISON in firsts:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANG in firsts:
            await trio.sleep_forever()  # its loop lives, and answers when it is asked
        return await run(self, batch, *rest)

    Stepping.run = deadly  # type: ignore[method-assign]
    worker_main.main()


if __name__ == "__main__":
    main()
