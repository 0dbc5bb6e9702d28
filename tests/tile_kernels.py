"""The C kernels with tiles: by the model of the instructions, and by the CPU where it has AMX."""

from functools import cache
from pathlib import Path

import pytest

from sagellm.backends.cpu.native.library import NativeKernels, native_kernels, open_kernels

MODEL = ("-DSAGE_TILE_MODEL", "-O1")  # flags of the compiler


def has_amx() -> bool:
    """Whether this machine has tiles of its own."""
    listing = Path("/proc/cpuinfo")
    return listing.exists() and " amx_tile " in listing.read_text()


WAYS = ["model", pytest.param("AMX", marks=pytest.mark.skipif(not has_amx(), reason="no AMX"))]


@cache
def kernels_by(way: str) -> NativeKernels:
    """The library whose tiles are the model's or the CPU's. Skips the test without a compiler."""
    kernels = open_kernels(flags=MODEL) if way == "model" else native_kernels()
    if kernels is None:
        pytest.skip("no C compiler on this machine")
    assert kernels.has_tiles
    return kernels
