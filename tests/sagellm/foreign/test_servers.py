"""Servers come and go while their graph runs."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from foreign_graph import graph, upstream
from gateway_session import served_session
from scripted_server import Call, text, used
from waiting import until

from sagellm import Graph, ops
from sagellm.cli import main
from sagellm.foreign.servers import ServerError, Servers
from sagellm.session import Session


def says(word: str) -> Any:
    async def script(call: Call) -> None:
        if call.path == "/health":
            return await call.whole({})
        await call.events(text(word, "stop"), used(1, 1))
        await call.done()

    return script


class Held:
    """Says a word, and then waits until it is let go."""

    def __init__(self) -> None:
        self.go = trio.Event()

    async def __call__(self, call: Call) -> None:
        await call.events(text("held "))
        await self.go.wait()
        await call.event(text("end", "stop"))
        await call.done()


@asynccontextmanager
async def opened(*urls: str) -> AsyncIterator[tuple[Session, Servers]]:
    async with graph(*urls).open(set={"route.strategy": "round_robin"}) as session:
        yield session, Servers(session.executor.plan.graph, session.executor)
        session.executor.core.ledger.check()


async def answers_of(session: Session, number: int) -> list[str]:
    return [(await session.generate(f"prompt {index}")).text for index in range(number)]


async def test_a_registered_server_gets_its_share() -> None:
    async with (
        upstream(says("a")) as first,
        upstream(says("b")) as second,
        opened(first.url) as (session, servers),
    ):
        assert await answers_of(session, 2) == ["a", "a"]
        found = await servers.register("far", second.url)
        assert (found.replica, found.state, found.model) == (1, "READY", "scripted")
        assert sorted(await answers_of(session, 4)) == ["a", "a", "b", "b"]
        assert [one.url for one in servers.statuses()] == [first.url, second.url]


async def test_a_removed_server_finishes_what_it_answers() -> None:
    held = Held()
    async with (
        upstream(held) as first,
        upstream(says("b")) as second,
        opened(first.url, second.url) as (session, servers),
    ):
        async with trio.open_nursery() as nursery, session.stream("prompt") as stream:
            assert [event.text for event in await stream.take()] == ["held "]
            nursery.start_soon(servers.remove, "far", 0)
            await until(lambda: servers.statuses()[0].state == "DRAINING")
            assert await answers_of(session, 3) == ["b", "b", "b"]
            held.go.set()
            rest = [event async for event in stream]
        assert "".join(event.text for event in rest) == "end"
        assert [one.state for one in servers.statuses()] == ["STOPPED", "READY"]


async def test_a_server_removed_by_force_hands_its_answers_over() -> None:
    async with (
        upstream(Held()) as first,
        upstream(says("b")) as second,
        opened(first.url, second.url) as (session, servers),
    ):
        async with session.stream("prompt") as stream:
            assert [event.text for event in await stream.take()] == ["held "]
            await servers.remove("far", 0, force=True)
            rest = [event async for event in stream]
        assert "".join(event.text for event in rest) == "b"
        assert second.asked[-1]["prompt"] == "promptheld "


async def test_a_server_can_come_back_under_a_new_number() -> None:
    async with (
        upstream(says("a")) as first,
        upstream(says("b")) as second,
        opened(first.url, second.url) as (session, servers),
    ):
        await servers.remove("far", 1)
        again = await servers.register("far", second.url)
        assert again.replica == 2
        assert sorted(await answers_of(session, 4)) == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://far", "not the URL of an HTTP server"),
        ("http://169.254.169.254/latest", "where no server may be registered"),
        ("http://[fe80::1]:80", "where no server may be registered"),
        ("http://[::ffff:169.254.169.254]", "where no server may be registered"),
        ("http://0.0.0.0:8000", "where no server may be registered"),
        ("http://no-such-host.invalid", "is not known"),
        ("http://127.0.0.1:9", "no server answers"),
    ],
)
async def test_what_is_no_server_is_refused(url: str, why: str) -> None:
    async with upstream(says("a")) as first, opened(first.url) as (session, servers):
        with pytest.raises(ServerError, match=why):
            await servers.register("far", url)
        assert len(servers.statuses()) == 1
        assert await answers_of(session, 1) == ["a"]


async def test_unknown_names_are_refused() -> None:
    async with upstream(says("a")) as first, opened(first.url) as (_, servers):
        with pytest.raises(ServerError, match="did you mean far"):
            await servers.register("farr", first.url)
        with pytest.raises(ServerError, match="is a server of far already"):
            await servers.register("far", first.url)
        with pytest.raises(ServerError, match="far has no server 7"):
            await servers.remove("far", 7)


async def test_an_engine_without_a_router_takes_no_server() -> None:
    async with upstream(says("a")) as first:
        chain = Graph("door").engine("far", kind="openai", urls=[first.url])
        async with (chain >> ops.generate(engine="far")).open() as session:
            servers = Servers(session.executor.plan.graph, session.executor)
            with pytest.raises(ServerError, match="no `route` leads to engine far"):
                await servers.register("far", first.url)


GRAPH = """
sagellm: 1
name: door
engines:
  far: {kind: openai, urls: []}
operators:
  sort:     {op: policy_sort}
  route:    {op: route, strategy: round_robin}
  generate: {op: generate, engine: far}
edges:
  - source -> sort -> route -> generate -> sink
"""


async def test_the_commands_reach_a_gateway(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    async def command(*args: str, code: int = 0) -> str:
        found = await trio.to_thread.run_sync(main, ["engine", *args])
        out, err = capsys.readouterr()
        assert found == code, err
        return out + err

    async with upstream(says("a")) as first, upstream(says("b")) as second:
        (tmp_path / "door.yaml").write_text(GRAPH)
        path = str(tmp_path / "door.yaml")
        async with served_session("hypercorn", path, {"far.urls": [first.url]}) as served:
            await command("register", "far", second.url)
            listed = json.loads(await command("list", "--json"))
            assert [one["state"] for one in listed] == ["READY", "READY"]
            assert sorted(await answers_of(served.session, 4)) == ["a", "a", "b", "b"]
            assert "STOPPED" in await command("remove", "far[0]")
            assert await answers_of(served.session, 2) == ["b", "b"]
            assert "write an engine and a number" in await command("remove", "far", code=2)
            assert "far has no server 9" in await command("remove", "far[9]", code=2)
