"""Readiness: what has to be seen before it, and what ends it."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import pytest
import trio
from gateway_calls import ScriptedBridge, event, last, playing
from logged import logged
from trio.testing import MockClock

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.graph_bridge import GraphBridge
from sagellm.gateway.readiness import PROBE_S, RETRY_S, WATCH_S, Probe, Readiness
from sagellm.runtime.messages import OPERATOR_FAILED, TokenEvent


@dataclass
class Health:
    is_hung: bool = False
    is_stopped: bool = False
    missing: str = ""


PROBES = (Probe((1,), "x"),)


@asynccontextmanager
async def watched(
    bridge: GraphBridge, health: Health, probes: Sequence[Probe] = PROBES
) -> AsyncIterator[Readiness]:
    readiness = Readiness()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(readiness.watch, bridge, lambda: health, probes)
        await trio.testing.wait_all_tasks_blocked()
        yield readiness
        nursery.cancel_scope.cancel()


async def test_it_is_not_ready_before_a_token_came() -> None:
    assert Readiness().is_ready is False
    async with watched(playing([event("a")], [last("b")]), Health()) as readiness:
        assert (readiness.is_ready, readiness.reason) == (True, "")


async def test_the_probe_is_one_token_before_all_others() -> None:
    bridge = playing([last("b")])
    async with watched(bridge, Health()):
        (request,) = bridge.requests
    assert (request.sampling.max_tokens, request.priority) == (1, 0)
    assert request.prompt_token_ids == (1,)
    assert bridge.left == [request.request_id]


async def test_each_model_is_probed_and_one_that_fails_is_named(autojump_clock: MockClock) -> None:
    answers: list[TokenEvent] = [last("a"), last(reason="refused"), last("a"), last("b")]
    bridge = ScriptedBridge(lambda request: [[answers.pop(0)]])
    probes = (Probe((1,), "x", "one"), Probe((2,), "x", "two"))
    async with watched(bridge, Health(), probes) as readiness:
        assert readiness.reason == "the graph ended the probe: refused (model two)"
        await trio.sleep(RETRY_S + 0.1)
        assert readiness.is_ready
    assert [request.model for request in bridge.requests] == ["one", "two", "one", "two"]


async def test_a_refused_probe_is_tried_again(autojump_clock: MockClock) -> None:
    answers: list[TokenEvent] = [last(reason="refused"), last("b")]
    bridge = ScriptedBridge(lambda request: [[answers.pop(0)]])
    async with watched(bridge, Health()) as readiness:
        assert not readiness.is_ready
        assert "refused" in readiness.reason
        await trio.sleep(RETRY_S + 0.1)
        assert readiness.is_ready


async def test_a_probe_that_own_code_fails_names_the_operator() -> None:
    end = last(reason="failed", code=OPERATOR_FAILED, error="after: the function f raised E")
    async with watched(playing([end]), Health()) as readiness:
        assert readiness.reason.endswith("failed; after: the function f raised E")


async def test_own_code_that_goes_on_failing_is_probed_less_often(
    autojump_clock: MockClock,
) -> None:
    """Each time its traceback is logged."""
    end = last(reason="failed", code=OPERATOR_FAILED, error="after: the function f raised E")
    answers = [end] * 9 + [last("b")]
    bridge = ScriptedBridge(lambda request: [[answers.pop(0)]])
    async with watched(bridge, Health()) as readiness:
        await trio.sleep(30)
        assert 4 <= len(bridge.requests) <= 7
        await trio.sleep(60)
        assert readiness.is_ready


async def test_a_graph_that_goes_on_failing_is_logged_once(autojump_clock: MockClock) -> None:
    def script(request: object) -> list[list[TokenEvent]]:
        raise RuntimeError

    bridge = ScriptedBridge(script)
    with logged() as lines:
        async with watched(bridge, Health()):
            await trio.sleep(20)
    assert len(bridge.requests) > 10
    assert [line["event"] for line in lines] == ["probe_failed", "readiness"]


async def test_a_probe_without_end_fails(autojump_clock: MockClock) -> None:
    bridge = ScriptedBridge(lambda request: [anyio.Event()])
    async with watched(bridge, Health()) as readiness:
        await trio.sleep(PROBE_S + 0.1)
        assert readiness.reason == "no token came in time"
        assert bridge.left == [bridge.requests[0].request_id]


@pytest.mark.parametrize("raised", [ApiError(503, "x"), RuntimeError("secret")])
async def test_a_graph_that_fails_says_nothing_of_why(raised: Exception) -> None:
    def script(request: object) -> list[list[TokenEvent]]:
        raise raised

    async with watched(ScriptedBridge(script), Health()) as readiness:
        assert (readiness.is_ready, readiness.reason) == (False, "the graph failed the probe")


async def test_a_hang_is_seen_at_once_and_needs_a_new_probe(autojump_clock: MockClock) -> None:
    health, bridge = Health(), playing([last("b")])
    async with watched(bridge, health) as readiness:
        health.is_hung = True
        await trio.sleep(WATCH_S + 0.01)
        assert (readiness.is_ready, readiness.reason) == (False, "an engine makes no progress")
        await trio.sleep(60)
        assert len(bridge.requests) == 1
        health.is_hung = False
        await trio.sleep(RETRY_S + 0.1)
        assert readiness.is_ready
        assert len(bridge.requests) == 2


async def test_a_graph_that_has_stopped_is_not_ready(autojump_clock: MockClock) -> None:
    health = Health()
    async with watched(playing([last("b")]), health) as readiness:
        health.is_stopped = True
        await trio.sleep(WATCH_S + 0.01)
        assert (readiness.is_ready, readiness.reason) == (False, "the graph has stopped")


async def test_a_path_without_a_worker_is_not_ready_and_each_change_is_one_line(
    autojump_clock: MockClock,
) -> None:
    health, bridge = Health(), playing([last("b")])
    with logged() as lines:
        async with watched(bridge, health) as readiness:
            health.missing = "engine d has no worker: d[0] is started again"
            await trio.sleep(WATCH_S + 0.01)
            assert (readiness.is_ready, readiness.reason) == (False, health.missing)
            await trio.sleep(10)
            health.missing = "engine d has no worker: d[0] dies again and again"
            await trio.sleep(10)
            assert (readiness.is_ready, readiness.reason) == (False, health.missing)
            assert len(bridge.requests) == 1
            health.missing = ""
            await trio.sleep(WATCH_S + 0.01)
            assert readiness.is_ready
    said = [(line["is_ready"], line["reason"][-11:]) for line in lines]
    assert said == [(True, ""), (False, "arted again"), (False, "n and again"), (True, "")]
