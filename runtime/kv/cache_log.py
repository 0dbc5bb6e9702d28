"""The log of a pool: which prefix blocks it has stored and dropped since it was last read."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

# Hashes in one report: 64 KiB. A step of some hundred sequences stores a tenth of that.
MAX_REPORTED = 8192
# Changes that wait for a slow reader: beyond that, telling all anew costs no more than they do.
MAX_PENDING = 4 * MAX_REPORTED


class CacheReport(NamedTuple):
    """As `CacheChanged` says, without the engine's name."""

    sequence: int
    is_first: bool
    stored: bytes
    dropped: bytes


class CacheLog:
    """Notes changes until they are read, at most `MAX_PENDING`: where more come, it forgets them
    and begins anew with all that is stored. `stored`: the hashes of all blocks, parents first.
    """

    def __init__(self, stored: Callable[[], Iterable[bytes]]) -> None:
        self._stored = stored
        self._changes: dict[bytes, bool] = {}  # of each block the last: whether it is stored
        self._rest: deque[bytes] = deque()  # reports of what was stored at the beginning
        self._is_due = True  # to begin anew
        self._sequence = 0

    @property
    def has_changes(self) -> bool:
        return self._is_due or bool(self._changes) or bool(self._rest)

    def resend_all(self) -> None:
        """Tell all that is stored once more; the reader has missed something."""
        self._is_due = True
        self._changes.clear()
        self._rest.clear()

    def note(self, block: bytes, *, is_stored: bool) -> None:
        """A block was stored, or dropped."""
        if self._is_due:
            return
        self._changes[block] = is_stored
        if len(self._changes) > MAX_PENDING:
            self.resend_all()

    def take(self) -> CacheReport | None:
        """The next report, of `MAX_REPORTED` blocks at most; None: there is nothing to report."""
        if not self.has_changes:
            return None
        self._sequence += 1
        if self._is_due:
            self._is_due = False
            self._rest = _packed(self._stored())
            return CacheReport(self._sequence, True, self._rest.popleft(), b"")
        if self._rest:
            return CacheReport(self._sequence, False, self._rest.popleft(), b"")
        return CacheReport(self._sequence, False, *self._take_changes())

    def _take_changes(self) -> tuple[bytes, bytes]:
        taken = list(self._changes.items())[:MAX_REPORTED]
        if len(taken) == len(self._changes):
            self._changes = {}
        else:
            for block, _ in taken:
                del self._changes[block]
        stored = b"".join([block for block, is_stored in taken if is_stored])
        return stored, b"".join([block for block, is_stored in taken if not is_stored])


def _packed(blocks: Iterable[bytes]) -> deque[bytes]:
    """Hashes in pieces of `MAX_REPORTED`; one piece at least."""
    every = list(blocks)
    starts = range(0, max(len(every), 1), MAX_REPORTED)
    return deque(b"".join(every[start : start + MAX_REPORTED]) for start in starts)
