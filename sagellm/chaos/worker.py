"""A worker whose KV transfers flip bits: what `kv_damage` of a scenario asks for."""

import os
import random
from collections.abc import Sequence

from sagellm import worker
from sagellm.runtime.kv.pool_bytes import Bytes, Run
from sagellm.runtime.kv.shared import SharedTransport

VARIABLE = "SAGELLM_CHAOS_KV_DAMAGE"


def damage(share: float) -> None:
    """From now on, that share of the chunks that come to this process has a bit that is wrong."""
    draw, copy = random.Random(os.getpid()), SharedTransport._copy

    def copy_and_flip(
        self: SharedTransport, source: Bytes, layers: range, runs: Sequence[Run]
    ) -> int:
        found = copy(self, source, layers, runs)
        if draw.random() >= share:
            return found
        landed = [run for _, run in runs]
        flipped = draw.choice(self._pool.views(layers, landed))
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        return self._pool.sum(layers, landed)

    SharedTransport._copy = copy_and_flip  # type: ignore[method-assign]


if __name__ == "__main__":
    damage(float(os.environ.get(VARIABLE, "0")))
    worker.main()
