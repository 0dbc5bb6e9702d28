"""Random models that are bound by requests over HTTP: whatever they write is valid."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jsonschema_rs
import pytest
from chat_templates import HERMES, QWEN3
from gateway_calls import Answered, post
from models_on_the_fly import make_model

from sagellm import Graph, ops
from sagellm.gateway.graph_bridge import SessionBridge
from sagellm.gateway.http.endpoints import chat, completions
from sagellm.gateway.protocol.sampling_params import model_cards
from sagellm.gateway.settings import Settings, Streaming

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["city", "days", "tags"],
    "additionalProperties": False,
}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now", "parameters": EMPTY}},
]
SCHEMAS = {"weather": PARAMETERS, "now": EMPTY}
NAMED = {"type": "function", "function": {"name": "weather"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": PARAMETERS}}
SEEDS = range(4)


@pytest.fixture(scope="module", params=[HERMES, QWEN3], ids=["hermes", "qwen3"])
def folder(request, tmp_path_factory):
    folder = make_model("qwen3", tmp_path_factory.mktemp("qwen3"), max_position_embeddings=1024)
    config = {"eos_token": "<|eos|>", "chat_template": request.param}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@asynccontextmanager
async def served(folder: Any, graph: str = "joint") -> AsyncIterator[Any]:
    async with Graph.load(graph).open(model=str(folder)) as session:
        (card,) = model_cards(session, Settings(served_models=("m",)))
        bridge = SessionBridge(session, Streaming())

        async def ask(endpoint: Any = chat, **body: Any) -> Answered:
            if endpoint is chat:
                body["messages"] = [{"role": "user", "content": "hi"}]
            answered = await post(
                endpoint,
                bridge,
                {"max_tokens": 300, **body},
                model=card,
                tokenizer=session.tokenizer,
            )
            assert answered.status == 200, answered.body
            return answered

        yield ask
        await session.idle()
        session.executor.core.ledger.check()


def check_call(call: Any) -> None:
    function = call["function"]
    jsonschema_rs.validate(SCHEMAS[function["name"]], json.loads(function["arguments"]))


@pytest.mark.parametrize("graph", ["joint", "pd"])
@pytest.mark.parametrize("choice", ["required", NAMED])
async def test_a_required_call_is_always_valid(folder: Any, graph: str, choice: Any) -> None:
    async with served(folder, graph) as ask:
        for seed in SEEDS:
            answered = await ask(
                tools=TOOLS,
                tool_choice=choice,
                parallel_tool_calls=False,
                seed=seed,
                temperature=1.5,
                chat_template_kwargs={"enable_thinking": False},
            )
            (made,) = answered.json["choices"]
            assert made["finish_reason"] == "tool_calls"
            (call,) = made["message"]["tool_calls"]
            check_call(call)
            assert choice == "required" or call["function"]["name"] == "weather"


async def test_a_streamed_call_is_that_of_the_whole_answer(folder: Any) -> None:
    fields = {"tools": TOOLS, "tool_choice": NAMED, "seed": 3, "temperature": 1.0}
    async with served(folder) as ask:
        whole = (await ask(**fields, n=2)).json["choices"]
        chunks = (await ask(**fields, n=2, stream=True)).events
    for index in range(2):
        choices = [each["choices"][0] for each in chunks if each["choices"][0]["index"] == index]
        pieces = [each for one in choices for each in one["delta"].get("tool_calls", ())]
        calls = whole[index]["message"].get("tool_calls", [])
        assert "".join(each["function"]["arguments"] for each in pieces) == "".join(
            call["function"]["arguments"] for call in calls
        )
        assert choices[-1]["finish_reason"] == whole[index]["finish_reason"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_schema_binds_the_content_of_a_chat(folder: Any, stream: bool) -> None:
    async with served(folder) as ask:
        for seed in SEEDS:
            answered = await ask(
                response_format=FORMAT,
                seed=seed,
                temperature=1.5,
                stream=stream,
                chat_template_kwargs={"enable_thinking": False},
            )
            text = answered.text() if stream else answered.json["choices"][0]["message"]["content"]
            jsonschema_rs.validate(PARAMETERS, json.loads(text))


@pytest.mark.parametrize("fields", [{"regex": "(ab){2,5}"}, {"guided_choice": ["abab", "ababab"]}])
async def test_a_completion_is_bound(folder: Any, fields: Any) -> None:
    async with served(folder) as ask:
        answered = await ask(completions, prompt=["a", "b"], n=2, temperature=1.5, **fields)
    choices = answered.json["choices"]
    assert len(choices) == 4
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    assert {choice["text"] for choice in choices} <= {"ab" * number for number in range(2, 6)}


async def test_cards_say_whether_engines_take_grammars(folder: Any) -> None:
    async with Graph.load("pd").open(model=str(folder)) as session:
        (card,) = model_cards(session, Settings(served_models=("m",)))
    assert card.takes_grammars
    null = Graph("g").engine("g", device="null")
    null >> ops.generate(engine="g")
    async with null.open() as session:
        (card,) = model_cards(session, Settings(served_models=("m",)))
    assert not card.takes_grammars
