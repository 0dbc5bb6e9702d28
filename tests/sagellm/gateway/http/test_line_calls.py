"""Requests of batches pass the endpoints of calls, at the lowest priority."""

import json
from pathlib import Path
from typing import Any

import anyio
import pytest
from gateway_calls import ScriptedBridge, event, gateway_before, last, playing

from sagellm.gateway.budgets import Budgets
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.http.app import App, build_app
from sagellm.gateway.http.line_calls import AppRequests
from sagellm.gateway.settings import Budget, Settings
from sagellm.runtime.messages import PRIORITIES

COMPLETIONS = "/v1/completions"


def app_of(gateway: Gateway) -> App:
    return build_app(gateway)


async def asked(gateway: Gateway, body: Any, endpoint: str = COMPLETIONS) -> Any:
    requests = AppRequests(gateway, app_of(gateway))
    return await requests.answer(endpoint, json.dumps(body).encode(), "alice", "abc")


async def test_an_answer_is_that_of_a_call_at_background_priority() -> None:
    bridge = playing([event("a")], [last("b")])
    reply = await asked(gateway_before(bridge), {"prompt": "x"})
    assert (reply.status, reply.code) == (200, None)
    assert json.loads(reply.body)["choices"][0]["text"] == "ab"
    [request] = bridge.requests
    assert request.priority == PRIORITIES["background"]
    assert (request.user_id, request.request_id) == ("alice", "abc")


async def test_a_batch_shares_the_prefixes_of_its_tenants_calls() -> None:
    bridge = playing([last("a")])
    gateway = gateway_before(bridge)
    await asked(gateway, {"prompt": "x"})
    assert bridge.requests[0].salt == gateway.salt_of("alice")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": "x", "temperature": -1}, 400, "temperature"),
        ({"prompt": "x", "model": "nobody"}, 404, "model"),
        ({"prompts": "x"}, 400, "prompts"),
        ([], 400, None),
    ],
)
async def test_an_error_is_that_of_a_call(body: Any, status: int, param: str | None) -> None:
    reply = await asked(gateway_before(playing()), body)
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["param"]) == (status, param)
    assert not reply.is_refused_for_now


async def test_overload_is_to_be_tried_again_and_an_end_by_the_operator_is_not() -> None:
    full = last("", "refused", code="queue_full", retry_after_s=7.0)
    reply = await asked(gateway_before(playing([full])), {"prompt": "x"})
    assert (reply.status, reply.is_refused_for_now, reply.retry_after_s) == (503, True, 7.0)
    ended = await asked(gateway_before(playing([last("", "cancelled", code="")])), {"prompt": "x"})
    assert (ended.status, ended.is_refused_for_now) == (503, False)


async def test_a_fault_is_a_500_without_its_text() -> None:
    def fault(request: Any) -> Any:
        raise RuntimeError("secret")

    reply = await asked(gateway_before(ScriptedBridge(fault)), {"prompt": "x"})
    assert reply.status == 500
    assert b"secret" not in reply.body
    assert b"abc" in reply.body


async def test_the_tenants_budget_is_not_asked() -> None:
    budgets = Budgets(Budget(num_open=1, num_waiting=1))
    gateway = gateway_before(playing([last("a")]), budgets=budgets)
    with budgets.hold("alice"):
        assert (await asked(gateway, {"prompt": "x"})).status == 200
        assert budgets.num_open("alice") == 1


async def test_a_drain_waits_for_a_request_of_a_batch(tmp_path: Path) -> None:
    gateway = gateway_before(playing(), settings=Settings(data_dir=tmp_path))
    app = app_of(gateway)
    requests, idle = AppRequests(gateway, app), anyio.Event()
    with requests.open_call():
        app.calls.when_idle(idle.set)
        assert not idle.is_set()
    assert idle.is_set()
    gateway.is_draining = True
    assert requests.is_draining
