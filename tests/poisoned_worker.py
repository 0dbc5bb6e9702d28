"""A worker that dies of a prompt: the likes of a fault in a kernel."""

import os
import signal
from typing import Any

from sagellm import worker
from sagellm.runtime.engine.stepping import Stepping

POISON = 13  # as the first token of a prompt


def main() -> None:
    run = Stepping.run

    async def deadly(self: Stepping, batch: Any, *rest: Any) -> Any:
        if any(sequence.tokens[0] == POISON for sequence in batch.sequences):
            os.kill(os.getpid(), signal.SIGKILL)
        return await run(self, batch, *rest)

    Stepping.run = deadly  # type: ignore[method-assign]
    worker.main()


if __name__ == "__main__":
    main()
