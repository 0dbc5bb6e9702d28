"""The output file: never overwritten unasked, whole lines only, resumable after a kill."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec

from sagellm.batch.record import encode
from sagellm.naming import naming


class Output:
    """Lines appended to a file, each flushed before the next. `answered` holds the ids it began
    with, as text. Used as a context: the file is closed at the end."""

    def __init__(self, file: BinaryIO, path: Path, answered: frozenset[str] = frozenset()) -> None:
        self.answered = answered
        self._file = file
        self._path = path

    def write(self, line: dict[str, Any]) -> None:
        with naming(self._path):
            self._file.write(encode(line))
            self._file.flush()

    def __enter__(self) -> "Output":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with naming(self._path):
            self._file.close()


def open_output(path: Path, *, force: bool = False, resume: bool = False) -> Output:
    """Open `path` for answers. Raises FileExistsError unless it is new, forced or resumed.

    Resuming keeps the whole lines that hold an answer, and drops errors and a torn last line:
    those are asked again.
    """
    if resume and path.exists():
        answered = _keep_answers(path)
        return Output(path.open("ab"), path, answered)
    return Output(path.open("wb" if force else "xb"), path)


def _keep_answers(path: Path) -> frozenset[str]:
    """Rewrite the file with its answers only, in one step; returns their ids."""
    answered = set()
    kept = path.with_name(path.name + ".resuming")
    with naming(kept), path.open("rb") as old, kept.open("wb") as new:
        for raw, id in _answers(old):
            new.write(raw)
            answered.add(id)
        new.flush()
        os.fsync(new.fileno())
    kept.replace(path)
    return frozenset(answered)


def _answers(lines: BinaryIO) -> Iterator[tuple[bytes, str]]:
    for raw in lines:
        try:
            line = msgspec.json.decode(raw)
        except ValueError:
            continue
        if raw.endswith(b"\n") and isinstance(line, dict) and "text" in line and "id" in line:
            yield raw, str(line["id"])
