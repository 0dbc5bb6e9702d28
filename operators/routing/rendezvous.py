"""Rendezvous hashing: a stable choice that moves few keys when the number of replicas changes."""

import hashlib
from collections.abc import Sequence


def choose_by_key(key: str, replicas: Sequence[int]) -> int:
    """The replica whose hash with the key is highest, the same in every process.

    One more replica takes 1 / (n + 1) of the keys, and moves no other; one that is missing moves
    its own only. Source: Thaler and Ravishankar, Using name-based mappings to increase hit rates,
    1998.
    """
    return max(replicas, key=lambda replica: _weight(key, replica))


def _weight(key: str, replica: int) -> bytes:
    salt = replica.to_bytes(8, "little")
    return hashlib.blake2b(key.encode(), digest_size=8, salt=salt).digest()
