"""Folders of sockets: those of killed graphs are removed, those of running graphs stay."""

import os
from pathlib import Path

import pytest

from sagellm.runtime.cluster.control import SocketFolder, remove_abandoned


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def abandoned() -> Path:
    """A folder as it is left by a graph whose processes were all killed."""
    folder = SocketFolder()
    (folder.path / "hub").touch()
    os.close(folder._lock)  # the kernel does
    return folder.path


def test_a_folder_is_of_its_user_alone_and_goes_with_its_graph(temporary: Path) -> None:
    folder = SocketFolder()
    assert folder.path.stat().st_mode & 0o777 == 0o700
    folder.remove()
    assert list(temporary.iterdir()) == []


def test_the_next_graph_removes_what_belongs_to_no_process(temporary: Path) -> None:
    other = temporary / "sagellm-native-0"
    other.mkdir()
    gone, alive = abandoned(), SocketFolder()
    assert not gone.exists()
    remove_abandoned()
    assert set(temporary.iterdir()) == {other, alive.path}
    alive.remove()


def test_a_lock_that_is_a_link_is_not_followed(temporary: Path) -> None:
    """Another user may have put the link there."""
    precious = temporary / "precious"
    precious.touch()
    trap = temporary / "sagellm-trap"
    trap.mkdir()
    (trap / "graph.lock").symlink_to(precious)
    remove_abandoned()
    assert precious.exists()
    assert trap.exists()
