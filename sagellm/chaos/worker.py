"""A worker whose KV transfers flip bits: what `kv_damage` of a scenario asks for."""

import importlib
import os
import random
from typing import Any

from sagellm import worker
from sagellm.backends.kv_storage import RunPairs

VARIABLE = "SAGELLM_CHAOS_KV_DAMAGE"
_STORAGE = "sagellm.backends.cpu.storage"  # imports torch


def damage(share: float) -> None:
    """From now on, that share of the chunks that come to this process has a bit that is wrong."""
    storage: Any = importlib.import_module(_STORAGE).CpuStorage
    draw, receive = random.Random(os.getpid()), storage.receive

    def receive_and_flip(self: Any, memory: memoryview, pairs: RunPairs, layers: range) -> int:
        found: int = receive(self, memory, pairs, layers)
        if draw.random() >= share:
            return found
        landed = [run for _, run in pairs]
        flipped: memoryview = draw.choice(self.read(landed, layers))
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        found = self.checksum(landed, layers)
        return found

    storage.receive = receive_and_flip


if __name__ == "__main__":
    if share := float(os.environ.get(VARIABLE, "0")):
        damage(share)
    worker.main()
