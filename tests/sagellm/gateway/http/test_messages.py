"""/v1/messages: calls over a scripted bridge, errors and keys of a real server, a bound model."""

import json
from typing import Any

import anyio
import pytest
from chat_templates import HERMES, TemplateTokenizer
from gateway_calls import MAX_MODEL_LEN, Answered, Client, event, gateway_before, last, playing
from gateway_calls import post as call_of
from gateway_served import SERVERS, Reply, Served, get, post, serving
from models_on_the_fly import make_model

from sagellm import Graph
from sagellm.gateway.graph_bridge import SessionBridge
from sagellm.gateway.http.endpoints import cancel
from sagellm.gateway.http.translated_endpoints import count_tokens, messages
from sagellm.gateway.protocol.sampling_params import ModelCard, model_cards
from sagellm.gateway.settings import Settings, Streaming

USER = {"role": "user", "content": "hey"}
BODY = {"model": "m", "max_tokens": 5, "messages": [USER]}
PROMPT = "user: hey\n"  # as the template of ByteTokenizer writes it


def types(answered: Answered) -> list[str]:
    return [line.partition("\n")[0].removeprefix("event: ") for line in answered.lines]


async def test_an_answer_is_a_message():
    answered = await call_of(messages, playing([event("a")], [last("b")]), BODY)
    answer = answered.json
    assert (answer["id"], answer["model"], answer["role"]) == ("msg_abc", "m", "assistant")
    assert answer["content"] == [{"type": "text", "text": "ab"}]
    assert answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"] == 3


async def test_a_stream_ends_with_the_message():
    bridge = playing([event("a")], [last("b", "length")])
    answered = await call_of(messages, bridge, {**BODY, "stream": True})
    assert answered.headers["content-type"] == "text/event-stream"
    assert types(answered) == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * 2,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert b"[DONE]" not in answered.body


async def test_the_body_decides_how_tokens_are_sampled():
    bridge = playing([last("a")])
    body = {**BODY, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "stop_sequences": ["#"]}
    await call_of(messages, bridge, body)
    (request,) = bridge.requests
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature) == (5, 0.5)
    assert (sampling.top_k, sampling.top_p, sampling.stop) == (3, 0.9, ("#",))
    assert request.tags["operation"] == "chat"


async def test_an_answer_may_be_as_long_as_the_context_allows():
    bridge = playing([last("a", "length")])
    answered = await call_of(messages, bridge, {**BODY, "max_tokens": 64_000})
    assert bridge.requests[0].sampling.max_tokens == MAX_MODEL_LEN - len(PROMPT)
    assert answered.json["stop_reason"] == "model_context_window_exceeded"
    answered = await call_of(messages, playing([last("a", "length")]), BODY)
    assert answered.json["stop_reason"] == "max_tokens"


@pytest.mark.parametrize("endpoint", [messages, count_tokens])
async def test_a_prompt_beyond_the_context_is_refused(endpoint: Any):
    said = {"model": "m", "messages": [{**USER, "content": "x" * 9999}]}
    more = {"max_tokens": 5} if endpoint is messages else {}
    answered = await call_of(endpoint, playing(), {**said, **more})
    error = answered.json["error"]
    assert (answered.status, error["param"]) == (400, "messages")
    assert error["message"].startswith("prompt is too long")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"tools": [{"name": "f", "input_schema": {}}] * 2}, "tools[1].name"),
        ({"model": "x" * 999}, "model"),
        ({"model": "nobody"}, "model"),
    ],
)
async def test_checks_of_chats_hold_under_the_names_of_this_api(fields: Any, param: str):
    answered = await call_of(messages, playing(), {**BODY, **fields})
    assert answered.json["error"]["param"] == param


@pytest.mark.parametrize(
    ("thinking", "text"),
    [({"type": "disabled"}, "is False"), ({"type": "adaptive"}, "is True"), (None, "is ")],
)
async def test_thinking_is_a_switch_of_the_template(thinking: Any, text: str):
    bridge, tokenizer = playing([last("a")]), TemplateTokenizer("is {{ enable_thinking }}")
    await call_of(messages, bridge, {**BODY, "thinking": thinking}, tokenizer=tokenizer)
    assert bridge.requests[0].prompt == text


async def test_an_error_after_the_first_event_ends_the_stream():
    bridge = playing([event("a")], [last("", "failed")])
    answered = await call_of(messages, bridge, {**BODY, "stream": True})
    assert (answered.status, answered.is_whole) == (200, True)
    assert types(answered)[-1] == "error"
    failed = json.loads(answered.lines[-1].partition("\ndata: ")[2])
    assert (failed["type"], failed["error"]["type"]) == ("error", "api_error")


async def test_tokens_are_counted_as_the_model_reads_them():
    said = {"model": "m", "messages": [USER], "system": "s"}
    answered = await call_of(count_tokens, playing(), said)
    assert answered.json == {"input_tokens": len("system: s\n" + PROMPT)}


async def test_a_model_that_renders_itself_counts_no_tokens():
    card = ModelCard(names=("m",), root="m", max_model_len=64, vocab_size=0, created=7)
    answered = await call_of(count_tokens, playing(), {"messages": [USER]}, model=card)
    assert (answered.status, answered.json["error"]["param"]) == (400, "model")


async def test_a_message_is_cancelled_by_its_id():
    bridge = playing(anyio.Event())
    gateway = gateway_before(bridge)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Client(BODY).call, messages, gateway)
        while not bridge.requests:
            await anyio.lowlevel.checkpoint()
        answered = await Client(id="msg_abc").call(cancel, gateway)
        tasks.cancel_scope.cancel()
    assert answered.json == {"id": "msg_abc", "cancelled": True}


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


PATHS = pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
KEYS = {"api_keys": {"alice": "user-key"}, "admin_key": "admin-key"}


def check_form(reply: Reply, status: int, kind: str) -> None:
    """An error of this API, whose id is in the header too."""
    body = json.loads(reply.body)
    assert (reply.status, body["type"], reply.error["type"]) == (status, "error", kind)
    assert set(body) == {"type", "error", "request_id"}
    assert body["request_id"] == reply.headers["request-id"] == reply.headers["x-request-id"]


@PATHS
async def test_every_error_has_the_form_of_the_api(server: str, path: str) -> None:
    async with serving(server) as served:
        check_form(await served.ask(post(path, {})), 400, "invalid_request_error")
        check_form(await served.ask(post(path, b"{")), 400, "invalid_request_error")
        check_form(await served.ask(get(path)), 405, "invalid_request_error")
        check_form(await served.ask(post(f"{path}/x", {})), 404, "not_found_error")
        unknown = {"model": "nobody", "messages": [USER]}
        more = {"max_tokens": 5} if path == "/v1/messages" else {}
        check_form(await served.ask(post(path, {**unknown, **more})), 404, "not_found_error")
        foreign = await served.ask(post(path, {}, "Origin: http://evil.example"))
        check_form(foreign, 403, "permission_error")
        coded = await served.ask(post(path, {}, "Content-Encoding: gzip"))
        check_form(coded, 415, "invalid_request_error")


async def refused(served: Served, path: str, *headers: str) -> int:
    """The status of a call without a body: 400 where the key is a good one."""
    reply = await served.ask(post(path, {}, *headers))
    if reply.status == 401 and path.startswith("/v1/messages"):
        check_form(reply, 401, "authentication_error")
    return reply.status


@PATHS
async def test_a_key_may_stand_in_a_header_of_the_api(server: str, path: str) -> None:
    async with serving(server, **KEYS) as served:
        assert await refused(served, path) == 401
        assert await refused(served, path, "x-api-key: user-key") == 400
        assert await refused(served, path, "x-api-key: admin-key") == 400
        assert await refused(served, path, "Authorization: Bearer user-key") == 400
        both = ("Authorization: Bearer user-key", "x-api-key: user-key")
        assert await refused(served, path, *both) == 400
        assert await refused(served, path, both[0], "x-api-key: wrong") == 401
        assert await refused(served, path, "Authorization: Bearer wrong", both[1]) == 401
        assert await refused(served, path, both[1], both[1]) == 401
        assert await refused(served, path, "x-api-key: ") == 401
        assert await refused(served, "/v1/chat/completions", both[1]) == 401
        assert await refused(served, f"{path}/", both[1]) == 307
        assert await refused(served, f"{path}/batches", both[1]) == 404


async def test_an_answer_repeats_the_id_of_the_call(server: str) -> None:
    async with serving(server) as served:
        said = {"messages": [USER]}
        reply = await served.ask(post("/v1/messages/count_tokens", said, "X-Request-ID: mine"))
        other = await served.ask(get("/v1/models"))
    assert reply.headers["request-id"] == "mine"
    assert "request-id" not in other.headers


TOOLS = [
    {
        "name": "weather",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    }
]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
async def test_a_model_that_must_call_a_tool_calls_it(tmp_path: Any, choice: Any):
    folder = make_model("qwen3", tmp_path, max_position_embeddings=512)
    config = {"eos_token": "<|eos|>", "chat_template": HERMES}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    choice = {**choice, "disable_parallel_tool_use": True}
    body = {"max_tokens": 200, "messages": [USER], "tools": TOOLS, "tool_choice": choice}
    async with Graph.load("joint").open(model=str(folder)) as session:
        (card,) = model_cards(session, Settings(served_models=("m",)))
        given: dict[str, Any] = {"model": card, "tokenizer": session.tokenizer}
        bridge = SessionBridge(session, Streaming())
        answered = await call_of(messages, bridge, body, **given)
        assert answered.status == 200, answered.body
        (use,) = answered.json["content"]
        assert answered.json["stop_reason"] == "tool_use"
        assert (use["type"], use["name"]) == ("tool_use", "weather")
        assert use["input"]["city"] in ("Paris", "Rome")
        result = {"type": "tool_result", "tool_use_id": use["id"], "content": "rain"}
        turns = [
            USER,
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result]},
        ]
        counted = await call_of(count_tokens, bridge, {"messages": turns, "tools": TOOLS}, **given)
        assert counted.json["input_tokens"] > answered.json["usage"]["input_tokens"]
