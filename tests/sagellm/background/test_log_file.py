"""Log files of background processes stay small, and are read from their end."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sagellm.background import log_file
from sagellm.background.log_file import follow, keep_small, last_lines, rotate


def test_rotation_moves_older_copies_up_and_drops_the_oldest(tmp_path: Path) -> None:
    path = tmp_path / "8000.log"
    for number in range(5):
        path.write_text(f"run {number}\n")
        rotate(path, 2)
    found = {each.name: each.read_text() for each in tmp_path.iterdir()}
    assert found == {"8000.log": "", "8000.log.1": "run 4\n", "8000.log.2": "run 3\n"}


def test_without_older_files_the_log_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "8000.log"
    path.write_text("a\n")
    rotate(path, 0)
    assert [each.name for each in tmp_path.iterdir()] == ["8000.log"]
    assert path.read_text() == ""


def test_a_file_that_others_append_to_is_kept_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_file, "_CHECK_S", 0.001)
    path = tmp_path / "8000.log"
    rotated = threading.Event()
    whole = log_file.rotate

    def noted(path: Path, num_files: int) -> None:
        whole(path, num_files)
        rotated.set()

    monkeypatch.setattr(log_file, "rotate", noted)
    with open(path, "a") as writer:
        keep_small(path, max_bytes=50, num_files=1)
        writer.write("x" * 60 + "\n")
        writer.flush()
        assert rotated.wait(10)
        writer.write("after\n")
        writer.flush()
        assert path.read_text() == "after\n"
    assert (tmp_path / "8000.log.1").read_text() == "x" * 60 + "\n"


def test_the_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "8000.log"
    path.write_text("a\nb\nc\n")
    assert last_lines(path, 2) == ["b", "c"]
    assert last_lines(path, 0) == []


def test_following_ends_after_the_last_text_and_survives_a_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_file, "_POLL_S", 0.0)
    path = tmp_path / "8000.log"
    path.write_text("old\n")
    happens: list[Callable[[], object]] = [
        lambda: path.write_text("old\nnew\n"),
        lambda: rotate(path, 1),
        lambda: path.write_text("later\n"),
        lambda: None,
    ]
    steps = iter(happens)

    def is_over() -> bool:
        step = next(steps, None)
        if step is not None:
            step()
        return step is None

    assert "".join(follow(path, is_over)) == "new\nlater\n"
