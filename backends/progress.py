"""What a start that takes long says of itself: to a person who waits, or over a link."""

from collections.abc import Callable
from typing import TypeAlias

import msgspec


class Compiling(msgspec.Struct, frozen=True, tag=True):
    """The C kernels are compiled, which happens once for a CPU, a compiler and a version."""

    compiler: str
    folder: str


class Loading(msgspec.Struct, frozen=True, tag=True):
    """So many bytes of a model's weights have been read; the last time `num_bytes` is the total."""

    model: str
    num_bytes: int
    total_bytes: int


Event: TypeAlias = Compiling | Loading
Progress: TypeAlias = Callable[[Event], None]  # called from the thread that loads


def silent(event: Event) -> None:
    """For whom nobody waits."""
