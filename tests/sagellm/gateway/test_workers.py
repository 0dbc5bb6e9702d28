"""The gateway before engines that are processes: clients notice no death, and none is left."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import trio
from gateway_process import ServedProcess, served_process
from gateway_served import SERVERS

NUM_STREAMS = 8
PROMPTS = [
    f"Story {n}: a fox met {n} friends at the sea, and they went" for n in range(NUM_STREAMS)
]
EXACT = ("--set", "p.deterministic=true", "--set", "d.deterministic=true")


@pytest.fixture(params=SERVERS)
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
