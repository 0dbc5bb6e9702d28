"""A graph in one process is listed as graphs with workers are; other commands are refused."""

import socket
import tempfile
from pathlib import Path

import pytest
import trio

from sagellm import Graph, ops
from sagellm.runtime.cluster.control import ControlRequest, ask, running, serve_control
from sagellm.runtime.cluster.control_commands import OneProcessCommands


def null_graph() -> Graph:
    graph = Graph("alone").engine("g", device="null", replicas=2)
    return graph >> ops.route() >> ops.generate(engine="g")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket's path has 107 bytes at the most."""
    monkeypatch.setattr("tempfile.tempdir", "/tmp")


@pytest.mark.usefixtures("short")
async def test_a_graph_in_one_process_is_listed_and_leaves_nothing() -> None:
    before = set(running())
    async with null_graph().open() as session, trio.open_nursery() as nursery:
        executor = session.executor
        await nursery.start(
            serve_control, OneProcessCommands(executor.plan.graph, executor.engines)
        )
        (path,) = set(running()) - before
        assert path.parent.stat().st_mode & 0o077 == 0
        rows = (await ask(path, ControlRequest("ps"))).rows
        assert [(row.operator, row.replica, row.state, row.executor) for row in rows] == [
            ("generate", 0, "ready", "tasks"), ("generate", 1, "ready", "tasks")
        ]  # fmt: skip
        assert "without workers" in (await ask(path, ControlRequest("restart", "generate"))).error
        assert (
            "did you mean generate?" in (await ask(path, ControlRequest("drain", "generat"))).error
        )
        nursery.cancel_scope.cancel()
    assert not path.parent.exists()


async def test_a_graph_goes_on_where_no_control_can_be_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with null_graph().open() as session, trio.open_nursery() as nursery:
        members = OneProcessCommands(session.executor.plan.graph, session.executor.engines)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
        await nursery.start(serve_control, members)
        long = tmp_path / ("x" * 120)
        long.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(long))
        await nursery.start(serve_control, members)
        assert list(long.iterdir()) == []
        assert not session.health().is_stopped


@pytest.mark.usefixtures("short")
def test_what_a_killed_graph_left_is_removed() -> None:
    folder = Path(tempfile.mkdtemp(prefix="sagellm-"))
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "control"))
    with pytest.raises(ConnectionRefusedError):
        trio.run(ask, folder / "control", ControlRequest("ps"))
    assert not folder.exists()
