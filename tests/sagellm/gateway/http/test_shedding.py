"""Calls are refused before they are read while the loop is too late to keep the objective."""

import json
import time
from contextlib import ExitStack
from socket import create_connection
from typing import Any

import pytest
import trio
from gateway_calls import Answered, Client, ScriptedBridge, gateway_before, last, playing
from gateway_served import STREAM, Reply, post, read_reply, serving
from gateway_session import ServedSession, served_session
from trio.testing import MockClock

from sagellm import Graph, ops
from sagellm.gateway.gateway import objective_of
from sagellm.gateway.http.app import build_app
from sagellm.gateway.metrics.meters import LoopLag, NoMeters
from sagellm.graphs.ir import FrozenMap, Node
from sagellm.graphs.ir import Graph as IR

ASKED = {"model": "m", "prompt": "a", "max_tokens": 1}


class LateMeters(NoMeters):
    """Of a loop that is this late."""

    def __init__(self, lag_s: float) -> None:
        self._lag_s = lag_s

    def app_lag_s(self) -> float:
        return self._lag_s


async def posted(
    path: str,
    lag_s: float = 0.0,
    objective_s: float | None = None,
    body: Any = ASKED,
    *,
    upload_s: float = 0.0,
    bridge: ScriptedBridge | None = None,
) -> Answered:
    graph = Graph("g").engine("g", device="null")
    shaped = graph >> ops.admission(slo_ttft_s=objective_s) >> ops.generate(engine="g")
    bridge = bridge or playing([last("x")])
    gateway = gateway_before(bridge, meters=LateMeters(lag_s), graph=shaped.ir)
    client = Client(body)
    length = str(len(json.dumps(body))).encode()
    headers = [(b"host", b"localhost"), (b"content-length", length)]
    scope = client.scope() | {
        "path": path,
        "raw_path": path.encode(),
        "http_version": "1.1",
        "scheme": "http",
        "headers": [*headers, (b"content-type", b"application/json")],
    }

    async def receive() -> Any:
        await trio.sleep(upload_s)
        return await client.receive()

    await build_app(gateway)(scope, receive, client.send)
    return client.answered


async def test_the_time_that_a_client_takes_to_send_its_body_is_its_own(
    autojump_clock: MockClock,
) -> None:
    """Else a client that holds its body back would arrive before those that came meanwhile."""
    bridge = playing([last("x")])
    await posted("/v1/completions", upload_s=3.0, bridge=bridge)
    assert [timing.waited_s for timing in bridge.timings] == [0.0]


@pytest.mark.parametrize(
    ("lag_s", "objective_s", "status"), [(0.05, 1.0, 200), (0.2, 1.0, 503), (9.0, None, 200)]
)
async def test_a_call_that_the_loop_would_make_late_is_refused(
    lag_s: float, objective_s: float | None, status: int
) -> None:
    answer = await posted("/v1/completions", lag_s, objective_s, ASKED)
    assert answer.status == status


async def test_the_refusal_says_when_to_come_back_and_reads_no_body() -> None:
    answer = await posted("/v1/completions", 0.5, 1.0, "no JSON object")
    error = answer.json["error"]
    assert (answer.status, error["code"]) == (503, "slo_unreachable")
    assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("5", "true")


async def test_what_generates_nothing_is_answered_however_late() -> None:
    answer = await posted("/tokenize", 9.0, 1.0, {"prompt": "a"})
    assert answer.status == 200


@pytest.mark.parametrize(
    ("objectives", "objective_s"),
    [((2.0,), 2.0), ((0.5, 3.0), 3.0), ((0.5, None), None), ((), None)],
)
def test_of_several_models_none_is_refused_for_the_objective_of_another(
    objectives: tuple[float | None, ...], objective_s: float | None
) -> None:
    nodes = tuple(
        Node(f"a{number}", "admission", FrozenMap({} if each is None else {"slo_ttft_s": each}))
        for number, each in enumerate(objectives)
    )
    assert objective_of(IR("g", nodes=nodes)) == objective_s


async def test_the_loop_of_the_server_is_watched() -> None:
    """As `sagellm serve` serves a graph; its loop is held up for half a second."""
    options = {"g.device": "null", "admission.slo_ttft_s": 1.0}
    async with served_session("hypercorn", "joint", options, num_gateways=0) as served:
        asked = post("/v1/completions", ASKED)
        with trio.fail_after(20):  # the start may have held the loop up
            while (await answered(served, asked)).status != 200:  # noqa: ASYNC110
                await trio.sleep(0.1)
        await trio.sleep(0.15)  # the watch sleeps for a tenth of a second
        time.sleep(0.5)  # noqa: ASYNC251
        reply = await answered(served, asked)
    assert (reply.status, reply.error["code"]) == (503, "slo_unreachable")


async def answered(served: ServedSession, raw: bytes) -> Reply:
    async with await served.connect() as stream:
        await stream.send_all(raw)
        return await read_reply(stream)


async def test_a_sleeper_that_is_not_yet_awake_counts(mock_clock: MockClock) -> None:
    lag = LoopLag(0.1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lag.run)
        await trio.testing.wait_all_tasks_blocked()
        assert lag.now_s() == 0.0
        mock_clock.jump(2.1)
        assert lag.now_s() == pytest.approx(2.0)
        await trio.testing.wait_all_tasks_blocked()
        assert lag.now_s() == pytest.approx(2.0)  # until the next has slept
        mock_clock.jump(0.1)
        await trio.testing.wait_all_tasks_blocked()
        assert lag.now_s() == pytest.approx(0.0)
        nursery.cancel_scope.cancel()


async def test_connections_that_wait_are_taken_in_one_turn_of_the_loop() -> None:
    async with serving("hypercorn") as served:
        with ExitStack() as clients:
            for _ in range(30):  # without a turn of the loop between
                client = clients.enter_context(create_connection(("127.0.0.1", served.port)))
                client.sendall(STREAM)
            num_turns = 0
            while len(served.bridge.held) < 30:
                await trio.lowlevel.checkpoint()
                num_turns += 1
            await served.let_go()
            await served.idle()
    assert num_turns < 30
