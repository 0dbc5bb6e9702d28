"""A graph built in Python is served like a file by the command."""

import json
import os
import signal
import socket
from functools import partial
from typing import Any

import pytest
import trio
from gateway_served import ask, post

import sagellm
from sagellm import Graph, ops

ASKED = {"model": "null", "prompt": "a", "max_tokens": 2}


def shout(request: sagellm.Request) -> str:
    return request.prompt.upper()


def graph() -> Graph:
    made = Graph("mine").engine("g", model="null", device="null")
    return made >> ops.map(shout) >> ops.generate(engine="g")


async def test_a_graph_of_python_answers_over_http(capsys: pytest.CaptureFixture[str]) -> None:
    async with trio.open_nursery() as nursery:
        url = await nursery.start(partial(graph().serve_async, port=0))
        port = int(url.rpartition(":")[2])
        reply = await trio.to_thread.run_sync(ask, port, post("/v1/completions", ASKED))
        assert reply.status == 200
        nursery.cancel_scope.cancel()
    assert f"at {url}" in capsys.readouterr().err


def test_the_blocking_form_ends_by_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal is sent as soon as the server prints its address."""
    lines: list[str] = []

    def told(line: str) -> None:
        lines.append(line)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("sagellm.http_server.print_address", told)
    sagellm.serve(graph(), port=0, served_model_name="mine", log_level=None)
    assert lines[0].startswith("sagellm serves mine at http://127.0.0.1:")


async def test_under_trio_the_blocking_form_names_the_other() -> None:
    with pytest.raises(RuntimeError, match=r"await graph\.serve_async"):
        graph().serve(port=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prot": 1}, TypeError, "did you mean 'port'"),
        ({"port": "x"}, ValueError, "option port of serve is 'x'; it takes a whole number"),
        ({"port": 99999}, ValueError, "option port of serve is 99999; it must be <= 65535"),
        ({"gateways": -1}, ValueError, "option gateways of serve is -1; it must be >= 0"),
        ({"drain_s": -1}, ValueError, "option drain_s of serve is -1"),
        ({"max_model_len": 1}, ValueError, "option max_model_len of serve is 1"),
        ({"executor": "processes"}, TypeError, r"graph\.open\(executor=\.\.\.\)\.serve\(\)"),
        ({"served_model_name": ""}, ValueError, "served-model-name is empty"),
        ({"host": "0.0.0.0"}, ValueError, "no API key"),
        ({"api_key": ("a", "a")}, ValueError, "given twice"),
        ({"gpu_memory_utilization": 0.5}, ValueError, "gpu-memory-utilization"),
    ],
)
def test_wrong_options_are_told_before_anything_starts(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sagellm.serve(graph(), **options)


def test_what_is_no_graph_is_named() -> None:
    with pytest.raises(TypeError, match=r"'pd' is no graph: write sagellm\.serve\(Graph\.load"):
        sagellm.serve("pd")  # type: ignore[arg-type]


def test_a_port_in_use_is_an_os_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        graph().open().serve(port=taken.getsockname()[1])


async def test_options_of_open_and_of_the_model_count() -> None:
    opening = graph().open(set={"g.max_num_seqs": 2})
    async with trio.open_nursery() as nursery:
        url = await nursery.start(partial(opening.serve_async, port=0, max_model_len=8))
        port = int(url.rpartition(":")[2])
        asked = post("/v1/completions", {**ASKED, "max_tokens": 99})
        reply = await trio.to_thread.run_sync(ask, port, asked)
        assert reply.status == 400
        nursery.cancel_scope.cancel()


async def test_the_shipped_map_is_served_by_processes_and_gateways() -> None:
    """Functions run in this process only; workers and gateways have none."""
    opening = Graph.load("map").open(model="null", set={"g.device": "null"}, executor="processes")
    async with trio.open_nursery() as nursery:
        url = await nursery.start(partial(opening.serve_async, port=0, gateways=2))
        port = int(url.rpartition(":")[2])
        for _ in range(4):
            asked = post("/v1/completions", {**ASKED, "prompt": "\ta"})
            reply = await trio.to_thread.run_sync(ask, port, asked)
            assert reply.status == 200
            assert json.loads(reply.body)["usage"]["completion_tokens"] == 2
        nursery.cancel_scope.cancel()
