"""The gateway before engines that are processes: clients notice no death, and none is left."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import trio
from gateway_process import ServedProcess, served_process
from gateway_served import DEFAULT_SERVER, Reply, get, post, read_reply, received
from gateway_session import served_session

from sagellm.gateway.readiness import WATCH_S
from sagellm.gateway.settings import Streaming

NUM_STREAMS = 8
PROMPTS = [
    f"Story {n}: a fox met {n} friends at the sea, and they went" for n in range(NUM_STREAMS)
]
EXACT = ("--set", "p.deterministic=true", "--set", "d.deterministic=true")


@pytest.fixture(params=DEFAULT_SERVER, scope="module")
def served(request: pytest.FixtureRequest) -> Iterator[ServedProcess]:
    options = ("--executor", "processes", "--server", request.param, *EXACT)
    with served_process(*options, graph="pd_many") as found:
        children = found.process.children(recursive=True)
        yield found
        children += found.process.children(recursive=True)
    assert not [child for child in children if child.is_running()]


def workers(command: str = "ps", *arguments: str) -> list[dict[str, Any]]:
    """What `sagellm ps`, or another command for workers, says."""
    line = [sys.executable, "-m", "sagellm", command, *arguments, "--json"]
    listed: list[dict[str, Any]] = json.loads(subprocess.check_output(line, timeout=60))
    return listed


def up_metrics(served: ServedProcess) -> list[str]:
    lines = served.get("/metrics").decode().splitlines()
    return [line for line in lines if line.startswith("sagellm_engine_up")]


def pid_of(served: ServedProcess, operator: str, replica: int) -> int:
    ours = {child.pid for child in served.process.children()}
    (pid,) = [
        row["pid"]
        for row in workers()
        if (row["operator"], row["replica"]) == (operator, replica) and row["pid"] in ours
    ]
    return int(pid)


async def stream_all(served: ServedProcess, meanwhile: Any = None) -> list[str]:
    """The texts of all prompts, streamed at once; each stream ends well."""
    texts = [""] * NUM_STREAMS

    async def stream(client: httpx2.AsyncClient, number: int) -> None:
        body = {"prompt": PROMPTS[number], "max_tokens": 150, "stream": True, "temperature": 1}
        body |= {"seed": number, "ignore_eos": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            lines = [line async for line in answer.aiter_lines() if line.startswith("data:")]
        assert lines.pop() == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data:")) for line in lines]
        texts[number] = "".join(chunk["choices"][0]["text"] for chunk in chunks)

    async with (
        httpx2.AsyncClient(base_url=served.url, timeout=60) as client,
        trio.open_nursery() as nursery,
    ):
        for number in range(NUM_STREAMS):
            nursery.start_soon(stream, client, number)
        if meanwhile is not None:
            nursery.start_soon(meanwhile)
    return texts


def test_nothing_listens_but_the_gateway_and_files_of_this_user(served: ServedProcess) -> None:
    processes = [served.process, *served.process.children(recursive=True)]
    listening = {
        found.laddr
        for process in processes
        for found in process.net_connections("inet")
        if found.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
    }
    assert listening == {("127.0.0.1", served.port)}
    files = {
        Path(found.laddr)
        for process in processes
        for found in process.net_connections("unix")
        if found.laddr and found.laddr.startswith("/")
    }
    assert files
    assert {path.parent.stat().st_mode & 0o777 for path in files} == {0o700}


async def test_clients_notice_neither_a_death_nor_a_restart(served: ServedProcess) -> None:
    victim = pid_of(served, "decode", 0)

    async def kill() -> None:
        await trio.sleep(0.1)
        psutil.Process(victim).kill()

    async def restart() -> None:
        which = "--graph-pid", str(served.process.pid)
        rows = await trio.to_thread.run_sync(workers, "restart", "prefill", *which)
        assert {row["state"] for row in rows} == {"ready"}

    async def scale() -> None:
        which = "--graph-pid", str(served.process.pid)
        for count in (1, 2):
            rows = await trio.to_thread.run_sync(workers, "scale", "decode", str(count), *which)
            assert len(rows) == count
            assert len(up_metrics(served)) == 2 + count

    right = await stream_all(served)
    assert all(right)
    assert await stream_all(served, scale) == right
    assert await stream_all(served, kill) == right
    assert await stream_all(served, restart) == right
    assert served.complete()["choices"][0]["finish_reason"] == "length"
    served.get("/ready")  # raises where it is not


ONE = {"g.deterministic": True, "g.max_model_len": 512}
HURRIED = Streaming(keep_alive_s=0.2)  # for five seconds


@dataclass
class Held:
    """Streams of one worker that is killed, and what a new call is told meanwhile."""

    texts: dict[int, str] = field(default_factory=dict)
    num_comments: dict[int, int] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    refusal: Reply | None = None
    refused_after_s: float = 0.0
    said: dict[str, Reply] = field(default_factory=dict)


async def held(*, kill: bool, max_hold_s: float = 30.0) -> Held:
    seen, num = Held(), 16
    options = {**ONE, "executor.max_hold_s": max_hold_s}
    opened = {"executor": "processes"}
    async with served_session(
        "hypercorn", "joint", options, opened=opened, streaming=HURRIED
    ) as served:

        async def stream(number: int) -> None:
            body = {"prompt": f"Story {number}: a fox", "max_tokens": 200, "seed": number}
            body["ignore_eos"] = True
            seen.texts[number] = ""
            async with await served.connect() as connection:
                await connection.send_all(post("/v1/completions", {**body, "stream": True}))
                data = b""
                while b"[DONE]" not in data:
                    data += await received(connection)
                    seen.texts[number] = _text(data)
            seen.num_comments[number] = data.count(b": keep-alive")
            found = re.search(rb'"code":"(\w+)"', data)
            seen.errors[number] = found[1].decode() if found else ""

        async def ask_meanwhile() -> None:
            began_s = trio.current_time()
            async with await served.connect() as connection:
                await connection.send_all(post("/v1/completions", {"prompt": "x"}))
                seen.refusal = await read_reply(connection)
            seen.refused_after_s = trio.current_time() - began_s
            await trio.sleep(2 * WATCH_S)
            for path in ("/ready", "/health"):
                async with await served.connect() as connection:
                    await connection.send_all(get(path))
                    seen.said[path] = await read_reply(connection)

        async with trio.open_nursery() as nursery:
            for number in range(num):
                nursery.start_soon(stream, number)
            if kill:
                while len(seen.texts) < num or not all(seen.texts.values()):  # noqa: ASYNC110
                    await trio.sleep(0.001)
                assert served.session.supervisor is not None
                (worker,) = served.session.supervisor.workers
                assert worker.pid is not None
                psutil.Process(worker.pid).kill()
                while worker.is_serving:  # noqa: ASYNC110
                    await trio.sleep(0.001)
                await ask_meanwhile()
        await served.session.idle()
        served.session.executor.core.ledger.check()
    return seen


def _text(data: bytes) -> str:
    """Of the whole events among what has come."""
    events = re.findall(rb"data: ({.*})\r?\n", data)
    chunks = [json.loads(event) for event in events if b'"error"' not in event]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


@pytest.mark.soak
async def test_streams_of_the_only_worker_are_held_until_it_is_back() -> None:
    """With comments, so that nobody on the way gives the connection up; new calls are refused."""
    right, found = await held(kill=False), await held(kill=True)
    assert found.texts == right.texts
    assert not any(found.errors.values())
    assert all(num >= 1 for num in found.num_comments.values())
    assert found.refusal is not None
    assert found.refusal.status == 503
    assert int(found.refusal.headers["retry-after"]) >= 1
    assert found.refused_after_s < 1.0
    assert {reply.status for reply in found.said.values()} == {503}
    reason = b"engine g has no worker: g[0] is started again"
    assert all(reason in reply.body for reply in found.said.values())


async def test_streams_whose_worker_is_not_back_in_time_are_told() -> None:
    found = await held(kill=True, max_hold_s=0.3)
    assert set(found.errors.values()) == {"unavailable"}
