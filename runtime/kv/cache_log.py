"""The log of a pool's prefix cache: the blocks stored and dropped since the log was last read."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

# Hashes in one report: 64 KiB. A step of some hundred sequences stores a tenth of that.
MAX_REPORTED = 8192
# Changes that wait for a slow reader. To send more of them costs as much as to send all blocks
# again.
MAX_PENDING = 4 * MAX_REPORTED


class CacheReport(NamedTuple):
    """One report of a log: the fields of `CacheChanged` without engine, replica and epoch."""

    sequence: int
    is_first: bool
    stored: bytes
    dropped: bytes


class CacheLog:
    """Keeps at most `MAX_PENDING` changes until they are read. If more changes come, the log drops
    all changes, and its next report begins again with all stored blocks.

    `stored` returns the hashes of all stored blocks, parents before children.
    """

    def __init__(self, stored: Callable[[], Iterable[bytes]]) -> None:
        self._stored = stored
        self._changes: dict[bytes, bool] = {}  # by block, the last change: whether it was stored
        self._rest: deque[bytes] = deque()  # later reports of a full report
        self._is_due = True  # whether a full report is to begin
        self._sequence = 0

    @property
    def has_changes(self) -> bool:
        return self._is_due or bool(self._changes) or bool(self._rest)

    def resend_all(self) -> None:
        """Begin again with a full report: the reader has missed a change."""
        self._is_due = True
        self._changes.clear()
        self._rest.clear()

    def note(self, block: bytes, *, is_stored: bool) -> None:
        """Record that a block was stored, or dropped."""
        if self._is_due:
            return  # the full report will contain it
        self._changes[block] = is_stored
        if len(self._changes) > MAX_PENDING:
            self.resend_all()

    def take(self) -> CacheReport | None:
        """Take the next report, of at most `MAX_REPORTED` blocks. None if nothing has changed."""
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
    """Join hashes into pieces of at most `MAX_REPORTED` hashes. An empty cache gives one empty
    piece, because it is reported too.
    """
    every = list(blocks)
    starts = range(0, max(len(every), 1), MAX_REPORTED)
    return deque(b"".join(every[start : start + MAX_REPORTED]) for start in starts)
