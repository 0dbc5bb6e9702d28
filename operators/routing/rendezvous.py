"""Rendezvous hashing: a stable choice that moves few keys when the number of replicas changes."""

import hashlib
import math
from collections.abc import Sequence

from sagellm.operators.routing.candidates import Candidates


def choose_by_key(key: str, replicas: Sequence[int]) -> int:
    """The replica whose hash with the key is highest, the same in every process.

    One more replica takes 1 / (n + 1) of the keys, and moves no other; one that is missing moves
    its own only. Source: Thaler and Ravishankar, Using name-based mappings to increase hit rates,
    1998.
    """
    return max(replicas, key=lambda replica: _weight(key, replica))


def choose_bounded(key: str, candidates: Candidates, load_factor: float | None) -> int:
    """The first replica in the order of their hashes that would not have more than `load_factor`
    times the mean number of requests; the first of all, where there is no bound.

    Source: Mirrokni, Thorup and Zadimoghaddam, Consistent hashing with bounded loads, 2018; here
    over rendezvous hashing.
    """
    numbers = candidates.numbers
    if load_factor is None:
        return choose_by_key(key, numbers)
    num_requests = sum(map(candidates.num_requests, numbers)) + 1
    most = math.ceil(load_factor * num_requests / len(numbers))
    room = [number for number in numbers if candidates.num_requests(number) < most]
    return choose_by_key(key, room or numbers)


def _weight(key: str, replica: int) -> bytes:
    salt = replica.to_bytes(8, "little")
    return hashlib.blake2b(key.encode(), digest_size=8, salt=salt).digest()
