import os
from io import FileIO
from pathlib import Path

import pytest
import trio

from sagellm.batch import prompt_lines
from sagellm.batch.prompt_lines import numbered_lines


async def read(path: Path) -> list[tuple[int, bytes]]:
    with FileIO(str(path)) as file:
        return [line async for line in numbered_lines(file)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"a", [(1, b"a")]),
        (b"a\nb\n", [(1, b"a"), (2, b"b")]),
        (b"a\r\n\n  \nb", [(1, b"a"), (4, b"b")]),
        (b"\xef\xbb\xbfa\n", [(1, b"a")]),
    ],
)
async def test_lines_that_are_not_blank_with_their_numbers(
    tmp_path: Path, content: bytes, expected: list[tuple[int, bytes]]
) -> None:
    path = tmp_path / "in"
    path.write_bytes(content)
    assert await read(path) == expected


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7])
async def test_chunks_do_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(prompt_lines, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "in"
    path.write_bytes(b"one\n\ntwo\nthree")
    assert await read(path) == [(1, b"one"), (3, b"two"), (4, b"three")]


async def test_a_silent_pipe_can_be_left() -> None:
    source, sink = os.pipe()
    with FileIO(source) as file, trio.move_on_after(0) as scope:
        async for _ in numbered_lines(file):
            raise AssertionError
    os.close(sink)
    assert scope.cancelled_caught


async def test_a_line_that_is_too_long_is_cut_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_lines, "MAX_LINE_BYTES", 4)
    monkeypatch.setattr(prompt_lines, "CHUNK_BYTES", 3)
    path = tmp_path / "in"
    path.write_bytes(b"      seven\nfour\n")
    assert await read(path) == [(1, b"     "), (2, b"four")]


class Chunk(bytes):
    """An extension that would copy the line fails."""

    def __radd__(self, rest: bytes) -> bytes:
        raise AssertionError


class Chunked(FileIO):
    def read(self, size: int | None = -1, /) -> Chunk:
        return Chunk(super().read(size))


async def test_a_long_line_is_not_copied_with_each_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_lines, "CHUNK_BYTES", 2)
    path = tmp_path / "in"
    path.write_bytes(b"a long line")
    with Chunked(str(path)) as file:
        assert [line async for line in numbered_lines(file)] == [(1, b"a long line")]
