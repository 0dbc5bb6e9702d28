"""The control socket: listing, restarting and draining workers; and requests that are broken."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from sagellm.graphs.ir import FrozenMap, Graph, Node
from sagellm.runtime.cluster.control import ControlRequest, ControlSocket, ask, running
from sagellm.runtime.cluster.control_commands import WorkerCommands
from sagellm.runtime.cluster.launch import ProcessLauncher
from sagellm.runtime.cluster.supervisor import Supervisor
from sagellm.runtime.cluster.worker import Watch

ENGINES = {"e": FrozenMap({"model": "null", "device": "null", "replicas": 2})}
NODES = tuple(
    Node(name, "decode", FrozenMap({"engine": "e"} if name != "sort" else {}))
    for name in ("sort", "decode", "generate")
)
GRAPH = Graph("g", "stream", NODES, (), FrozenMap({"engines": FrozenMap(ENGINES)}))


@asynccontextmanager
async def controlled() -> AsyncIterator[tuple[Supervisor, Path]]:
    launcher = ProcessLauncher("sagellm.opening.worker_main")
    supervisor = Supervisor(GRAPH, {"e": 2}, launcher, watch=Watch(ping_s=0.02))
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        await nursery.start(ControlSocket(WorkerCommands(supervisor), launcher.folder).run)
        yield supervisor, launcher.folder
        nursery.cancel_scope.cancel()


async def test_a_running_graph_tells_who_works_changes_it_and_refuses_what_it_does_not_know() -> (
    None
):
    async with controlled() as (supervisor, folder):
        (path,) = [path for path in running() if path.parent == folder]
        listed = await ask(path, ControlRequest("ps"))
        assert [(row.operator, row.replica, row.state) for row in listed.rows] == [
            *(("decode", 0, "ready"), ("decode", 1, "ready")),
            *(("generate", 0, "ready"), ("generate", 1, "ready")),
        ]
        assert [row.pid for row in listed.rows[:2]] == [one.pid for one in supervisor.workers]

        (drained,) = (await ask(path, ControlRequest("drain", "decode", 1))).rows
        assert (drained.state, drained.pid) == ("drained", listed.rows[1].pid)

        back = (await ask(path, ControlRequest("restart", "generate"))).rows
        assert [(row.replica, row.state, row.restarts) for row in back] == [
            *((0, "ready", 0), (1, "ready", 0))
        ]
        assert not {row.pid for row in back} & {row.pid for row in listed.rows}

        fewer = (await ask(path, ControlRequest("scale", "decode", count=1))).rows
        assert [(row.operator, row.replica, row.state) for row in fewer] == [("decode", 0, "ready")]
        assert (
            "needs a replica" in (await ask(path, ControlRequest("scale", "decode", count=0))).error
        )

        assert "did you mean decode?" in (await ask(path, ControlRequest("drain", "decod"))).error
        assert "no replica 7" in (await ask(path, ControlRequest("drain", "decode", 7))).error
        for garbage in (b"{}\n", b"ps\n", b'{"command": "\xff"}\n', b"x" * 10_000, b""):
            assert b"not understood" in await said(str(path), garbage)
    assert folder not in [path.parent for path in running()]


async def test_a_restart_takes_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sagellm.runtime.cluster.control._REQUEST_TIMEOUT_S", 0.05)
    async with controlled() as (_, folder):
        rows = (await ask(folder / "control", ControlRequest("restart", "decode"))).rows
        assert [row.state for row in rows] == ["ready", "ready"]


async def test_a_restart_does_not_keep_a_graph_from_ending() -> None:
    with trio.fail_after(20):
        async with controlled() as (_, folder), trio.open_nursery() as nursery:

            @nursery.start_soon
            async def restart() -> None:
                with suppress(trio.BrokenResourceError, OSError):
                    await ask(folder / "control", ControlRequest("restart"))

            await trio.sleep(0.2)
            nursery.cancel_scope.cancel()


async def said(path: str, line: bytes) -> bytes:
    async with await trio.open_unix_socket(path) as stream:
        try:
            await stream.send_all(line)
            await stream.send_eof()
        except trio.BrokenResourceError:
            pass  # it has read enough
        found = b""
        try:
            async for part in stream:
                found += part
        except trio.BrokenResourceError:
            pass
        return found or b"not understood"


@pytest.mark.parametrize("fields", [{"command": "stop"}, {"command": "ps", "all": True}])
def test_only_what_is_known_can_be_asked(fields: dict[str, Any]) -> None:
    import msgspec

    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(fields, ControlRequest)
