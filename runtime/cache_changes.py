"""What an engine says of the prefix blocks that it has: changes in order, or all of them anew."""

from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias, runtime_checkable

import msgspec

from sagellm.runtime.block_hash import HASH_BYTES


class CacheChanged(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="cache"):
    """Prefix blocks that a replica of an engine has stored and dropped since the report before.

    `sequence` rises by one within an `epoch`, which is one life of the replica. `is_first`: the
    reports from this one on say all that it has; what was known of it before is void. `stored` and
    `dropped` are hashes of HASH_BYTES each, one after the other; a block is in one of them, at
    most. Blocks of a beginning come before those after it.
    """

    engine: str
    replica: int
    epoch: int
    sequence: int
    is_first: bool = False
    stored: bytes = b""
    dropped: bytes = b""


TellCache: TypeAlias = Callable[[CacheChanged], None]


@runtime_checkable
class ReportsCache(Protocol):
    """An engine that says which prefix blocks it has. One that does not is taken to have none."""

    def report_cache(self, tell: TellCache) -> None:
        """Call `tell` with all blocks that are there now, and with changes from then on: once a
        step at most, unless there are many. Asked again, it begins anew. Nothing is noted, or sent,
        before it is asked.
        """


def hashes_in(packed: bytes) -> Iterator[bytes]:
    """The hashes that lie one after the other."""
    return (packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES))
