"""Calls of C kernels with their memory: written to a file, run by driver.c, and read back.

case = Calls("a product of 3 rows")
out = case.array(np.zeros((3, 7), np.float32), is_kept=True)
case.call("sage_linear", linear, ...)
(results,) = run(command, [case], folder)
results[out]
"""

import ctypes
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

NAME_BYTES = 32
MOST_ARGUMENTS = 20


@dataclass(frozen=True)
class Blob:
    """Memory of a case, by its number. `offset`: in bytes, where a pointer to it points."""

    number: int
    offset: int = 0

    def at(self, offset: int) -> "Blob":
        return Blob(self.number, self.offset + offset)


@dataclass
class Calls:
    """Calls of one case, in order. A call returns its number among the calls."""

    name: str
    blobs: list[tuple[bytes | None, int, bool]] = field(default_factory=list)
    links: list[tuple[int, int, int | str, int]] = field(default_factory=list)
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    kept: dict[int, tuple[np.dtype[Any], tuple[int, ...]]] = field(default_factory=dict)

    def array(self, array: Any, *, is_kept: bool = False) -> Blob:
        """Memory with these contents. `is_kept`: the results have what the calls leave in it."""
        array = np.ascontiguousarray(array)
        if is_kept:
            self.kept[len(self.blobs)] = (array.dtype, array.shape)
        self.blobs.append((array.tobytes(), array.nbytes, is_kept))
        return Blob(len(self.blobs) - 1)

    def allocated(self, call: int) -> Blob:
        """Memory of as many bytes as a call returned."""
        self.blobs.append((None, -1, False))
        blob = Blob(len(self.blobs) - 1)
        self.call("allocate", blob.number, call)
        return blob

    def struct(self, kind: type[ctypes.Structure], **values: Any) -> Blob:
        """A struct. A value is a number, a Blob to point to, or the name of a function."""
        return self.structs(kind, [values])

    def structs(self, kind: type[ctypes.Structure], rows: Sequence[dict[str, Any]]) -> Blob:
        """An array of structs; see `struct`."""
        made = (kind * len(rows))()
        for index, values in enumerate(rows):
            for name, value in values.items():
                at = index * ctypes.sizeof(kind) + getattr(kind, name).offset
                if isinstance(value, Blob):
                    self.links.append((len(self.blobs), at, value.number, value.offset))
                elif isinstance(value, str):
                    self.links.append((len(self.blobs), at, value, 0))
                else:
                    setattr(made[index], name, value)
        return self.array(np.frombuffer(bytes(made), np.uint8))

    def pointers(self, targets: Sequence[Blob]) -> Blob:
        """An array of pointers."""
        number = len(self.blobs)
        self.links += [(number, 8 * i, to.number, to.offset) for i, to in enumerate(targets)]
        return self.array(np.zeros(len(targets), np.int64))

    def call(self, function: str, *values: Any) -> int:
        self.calls.append((function, values))
        return len(self.calls) - 1


@dataclass(frozen=True)
class Results:
    """What the calls of a case returned, and the memory that they left."""

    returned: list[int]
    memory: dict[int, np.ndarray[Any, Any]]

    def __getitem__(self, blob: Blob) -> np.ndarray[Any, Any]:
        return self.memory[blob.number]


def run(command: Sequence[str], cases: Sequence[Calls], folder: Path) -> list[Results]:
    """Run the cases by the driver `command`. Raises CalledProcessError."""
    source, target = folder / "cases", folder / "results"
    source.write_bytes(_file(cases))
    subprocess.run(
        [*command, str(source), str(target)], check=True, capture_output=True, timeout=600
    )
    return _read(target.read_bytes(), cases)


def _file(cases: Sequence[Calls]) -> bytes:
    names: dict[str, int] = {}
    bodies = [_body(case, names) for case in cases]
    table = b"".join(name.encode().ljust(NAME_BYTES, b"\0") for name in names)
    return b"".join([_numbers(len(names)), table, *bodies])


def _numbers(*numbers: int) -> bytes:
    return np.array(numbers, np.int64).tobytes()


def _body(case: Calls, names: dict[str, int]) -> bytes:
    parts = [_numbers(len(case.blobs), len(case.links), len(case.calls))]
    for contents, size, is_kept in case.blobs:
        parts.append(_numbers(size, contents is not None, is_kept))
        parts.append((contents or b"").ljust(-(-max(size, 0) // 8) * 8, b"\0"))
    for blob, at, target, offset in case.links:
        number = -1 - _number(target, names) if isinstance(target, str) else target
        parts.append(_numbers(blob, at, number, offset))
    for function, values in case.calls:
        packed = [part for value in values for part in _value(value)]
        padded = packed + [0] * (3 * MOST_ARGUMENTS - len(packed))
        parts.append(_numbers(_number(function, names), len(values), *padded))
    return b"".join(parts)


def _number(function: str, names: dict[str, int]) -> int:
    return names.setdefault(function, len(names))


def _value(value: Any) -> tuple[int, int, int]:
    if isinstance(value, Blob):
        return 1, value.number, value.offset
    if isinstance(value, float):
        return 0, int(np.float32(value).view(np.int32)), 0
    return 0, int(value or 0), 0  # None: NULL


def _read(data: bytes, cases: Sequence[Calls]) -> list[Results]:
    at, found = 0, []

    def take(count: int, kind: Any) -> np.ndarray[Any, Any]:
        nonlocal at
        taken = np.frombuffer(data, kind, count, at)
        at += taken.nbytes
        return taken

    for case in cases:
        returned = [int(number) for number in take(len(case.calls), np.int64)]
        memory = {}
        for number, (kind, shape) in case.kept.items():
            take(1, np.int64)
            memory[number] = take(int(np.prod(shape)), kind).reshape(shape)
        found.append(Results(returned, memory))
    assert at == len(data)
    return found
