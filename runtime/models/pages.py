"""Memory of mapped files: pages that were read stay in it until somebody gives them back."""

import ctypes
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

_MAPS = Path("/proc/self/maps")


def give_back(files: Iterable[Path]) -> None:
    """Take the pages of these files out of this process, wherever they are mapped.

    What lies there stays good: where it is read again, the system brings it back; where somebody
    has written to a private copy, the writing is lost. Nothing happens where the system is not
    Linux.
    """
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for low, high in _mapped({str(file.resolve()) for file in files}):
        advise(low, high - low, mmap.MADV_DONTNEED)


def _mapped(names: set[str]) -> Iterator[tuple[int, int]]:
    """Where this process has mapped them."""
    if not _MAPS.exists():
        return
    for line in _MAPS.read_text().splitlines():
        places, *_, name = line.split(maxsplit=5)
        if name in names:
            low, _, high = places.partition("-")
            yield int(low, 16), int(high, 16)
