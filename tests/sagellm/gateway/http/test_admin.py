"""What whoever runs the server may do."""

from typing import Any

import anyio
import pytest
from gateway_calls import Client, gateway_before, playing

from sagellm import Graph
from sagellm.gateway.http.endpoints import cancel, completions, graph
from sagellm.graphs.text.codec import from_json


async def cancelled(named: str, body: Any) -> Any:
    """Cancel by that name while one call is under way."""
    bridge = playing(anyio.Event())
    gateway = gateway_before(bridge)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Client(body).call, completions, gateway)
        while not bridge.requests:
            await anyio.lowlevel.checkpoint()
        answered = await Client(id=named).call(cancel, gateway)
        tasks.cancel_scope.cancel()
    return answered, bridge


@pytest.mark.parametrize("named", ["abc", "cmpl-abc", "chatcmpl-abc"])
async def test_a_call_is_cancelled_by_its_id_or_that_of_its_answer(named):
    answered, bridge = await cancelled(named, {"prompt": "a"})
    assert answered.json == {"id": named, "cancelled": True}
    assert bridge.cancelled == ["abc"]


async def test_all_prompts_of_a_call_are_cancelled():
    _, bridge = await cancelled("abc", {"prompt": ["a", "b"]})
    assert bridge.cancelled == ["abc/0", "abc/1"]


@pytest.mark.parametrize("named", ["abd", "abc/0", "cmpl-", ""])
async def test_an_unknown_call_is_not_found(named):
    answered, bridge = await cancelled(named, {"prompt": "a"})
    assert answered.status == 404
    assert answered.json["error"]["code"] == "request_not_found"
    assert not bridge.cancelled


async def test_the_graph_is_shown():
    served = Graph.load("pd").ir
    answered = await Client().call(graph, gateway_before(playing(), graph=served))
    assert from_json(answered.body) == served


async def test_without_a_graph_there_is_none():
    answered = await Client().call(graph, gateway_before(playing()))
    assert answered.status == 404
