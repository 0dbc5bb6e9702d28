"""/v1/responses from the body to the answer: tools round trip, structured output, errors, ids."""

import json
from dataclasses import replace
from typing import Any

import pytest
from chat_templates import CARD, HERMES, PLAIN, QWEN3, TemplateTokenizer
from gateway_calls import (
    Answered,
    Client,
    ScriptedBridge,
    event,
    gateway_before,
    last,
    playing,
    post,
)

from sagellm.gateway.gateway import Gateway, plain_id
from sagellm.gateway.http.endpoints import cancel
from sagellm.gateway.http.translated_endpoints import input_tokens, responses, stored_response
from sagellm.gateway.settings import RequestLimits
from sagellm.runtime.messages import Request
from sagellm.runtime.sampling import Grammar

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOL = {"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}
CALLED = '<think>hm</think>One moment.<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
USER = {"role": "user", "content": "hi"}
SECRET = "the-schema-nobody-may-see"


async def answered(*batches: Any, template: str = HERMES, **body: Any) -> Answered:
    bridge = playing(*(batches or ([last("hi")],)))
    tokenizer = TemplateTokenizer(template)
    return await post(responses, bridge, {"input": "hi", **body}, tokenizer=tokenizer, model=CARD)


async def answer(*batches: Any, **body: Any) -> Any:
    found = await answered(*batches, **body)
    assert found.status == 200, found.body
    return found.json


async def asked(template: str = HERMES, **body: Any) -> Request:
    bridge = playing([last("hi")])
    tokenizer = TemplateTokenizer(template)
    said = {"input": "hi", **body}
    found = await post(responses, bridge, said, tokenizer=tokenizer, model=CARD)
    assert found.status == 200, found.body
    return bridge.requests[0]


async def error(**body: Any) -> Any:
    found = await answered(**body)
    assert found.status == 400, found.body
    assert SECRET not in found.json["error"]["message"]
    return found.json["error"]


def letters(text: str) -> list[Any]:
    return [*([event(letter)] for letter in text), [last("")]]


async def test_the_answer_repeats_what_was_asked():
    found = await answer(
        instructions="be brief",
        max_output_tokens=5,
        temperature=0.5,
        tools=[TOOL],
        tool_choice={"type": "function", "name": "f"},
        metadata={"a": "b"},
        reasoning={"effort": "low"},
        text={"verbosity": "low"},
        parallel_tool_calls=False,
        store=True,
        user="u",
    )
    assert found["id"] == "resp_abc"
    assert (found["instructions"], found["max_output_tokens"]) == ("be brief", 5)
    assert (found["temperature"], found["top_p"], found["user"]) == (0.5, 1.0, "u")
    assert found["tools"] == [{**TOOL, "description": None}]
    assert found["tool_choice"] == {"type": "function", "name": "f"}
    assert found["metadata"] == {"a": "b"}
    assert found["reasoning"] == {"effort": "low", "summary": None}
    assert found["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert (found["parallel_tool_calls"], found["store"]) == (False, False)


async def test_a_schema_is_repeated_as_it_was_sent():
    form = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
    found = await answer(text={"format": form})
    assert found["text"]["format"] == {**form, "description": None}


async def test_reasoning_text_and_calls_are_items():
    found = await answer(*letters(CALLED), template=QWEN3, tools=[TOOL])
    thought, message, call = found["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert message["content"][0]["text"] == "One moment."
    assert (call["name"], json.loads(call["arguments"])) == ("f", {"x": 1})
    assert call["call_id"] != call["id"]
    assert found["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


async def test_the_items_of_an_answer_are_taken_back():
    """The prompt of the next turn has the reasoning, the text, the call and its output."""
    first = await answer(*letters(CALLED), template=QWEN3, tools=[TOOL])
    call = first["output"][2]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "42"}
    user = {"role": "user", "content": "hi"}
    request = await asked(QWEN3, input=[user, *first["output"], output], tools=[TOOL])
    assert request.prompt.partition("user: ")[2] == (
        'hi\nassistant: One moment.<tool_call>{"name": "f", "arguments": {"x": 1}}\n'
        "tool: 42\nassistant: "
    )


async def test_the_stream_has_the_items_of_the_whole_answer():
    whole = await answer(*letters(CALLED), template=QWEN3, tools=[TOOL])
    streamed = await answered(*letters(CALLED), template=QWEN3, tools=[TOOL], stream=True)
    assert streamed.headers["content-type"] == "text/event-stream"
    *events, end = [json.loads(line.partition("\ndata: ")[2]) for line in streamed.lines]
    assert end["type"] == "response.completed"
    pieces = [one["delta"] for one in events if one["type"].endswith("arguments.delta")]
    assert "".join(pieces) == whole["output"][2]["arguments"]
    new = {"id": "", "call_id": ""}  # in each answer
    shapes = [{**item, **new} for item in whole["output"]]
    assert [{**item, **new} for item in end["response"]["output"]] == shapes
    assert b"[DONE]" not in streamed.body
    assert streamed.is_whole


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ('<tool_call>{"name": "f", "arguments": {"x": ', "incomplete"),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}}', "completed"),
    ],
)
async def test_a_call_that_a_stop_string_cut_is_incomplete(text: str, status: str):
    found = await answer([event(text)], [last("", stop_reason="1")], tools=[TOOL])
    assert found["output"][-1]["status"] == status


async def test_without_reasoning_the_answer_has_none():
    found = await answer(*letters("<think>hm</think>so"), template=QWEN3, include_reasoning=False)
    assert [item["type"] for item in found["output"]] == ["message"]


async def test_a_schema_binds_the_answer():
    form = {"type": "json_schema", "name": "n", "schema": SCHEMA}
    request = await asked(text={"format": form})
    assert request.sampling.grammar == Grammar(
        kind="json_schema", text=json.dumps(SCHEMA, separators=(",", ":"))
    )


async def test_a_required_call_binds_the_answer():
    request = await asked(tools=[TOOL], tool_choice="required")
    assert request.sampling.grammar is not None
    assert (await asked(tools=[TOOL], tool_choice="none")).sampling.grammar is None


async def test_allowed_tools_are_those_that_the_model_sees():
    named = {"type": "function", "name": "g"}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [named]}
    request = await asked(tools=[TOOL, {"type": "function", "name": "g"}], tool_choice=choice)
    assert '"name": "g"' in request.prompt
    assert '"name": "f"' not in request.prompt


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "x" * 5000}, "input"),
        ({"max_output_tokens": 4096}, "input"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": SECRET}}}},
            "text.format.schema",
        ),
        (
            {
                "tools": [
                    {
                        **TOOL,
                        "parameters": {"type": "object", "properties": {"x": {"type": SECRET}}},
                    }
                ],
                "tool_choice": "required",
            },
            "tools[0].parameters",
        ),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "g"}],
                },
            },
            "tool_choice.tools[0].name",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"template": PLAIN, "tools": [TOOL]}, "tools"),
    ],
)
async def test_faults_that_the_model_shows_name_the_field(body: Any, param: str):
    assert (await error(**body))["param"] == param


async def test_a_prompt_too_long_is_truncated_where_that_is_asked():
    request = await asked(input="x" * 5000, truncation="auto")
    assert len(request.prompt_token_ids) == CARD.max_model_len - 1


async def test_the_last_event_of_a_stream_that_fails_is_the_failure():
    found = await answered([event("a")], [last("", "failed")], stream=True)
    *_, told, failed = [json.loads(line.partition("\ndata: ")[2]) for line in found.lines]
    assert (told["type"], failed["type"]) == ("error", "response.failed")
    assert "abc" in failed["response"]["error"]["message"]


async def test_a_refusal_before_the_first_event_keeps_its_status():
    refused = last("", "refused", code="queue_full")
    assert (await answered([refused], stream=True)).status == 503
    assert (await answered([last("", "failed")])).status == 500


async def test_the_call_counts_as_a_chat():
    assert (await asked()).tags["operation"] == "chat"


async def test_an_answers_id_cancels_its_call():
    assert plain_id("resp_abc") == "abc"
    bridge = playing()
    gateway = gateway_before(bridge)
    with gateway.claim("abc"):
        found = await Client(id="resp_abc").call(cancel, gateway)
    assert found.json == {"id": "resp_abc", "cancelled": True}
    assert bridge.cancelled == ["abc"]


def calling(*batches: Any) -> tuple[Gateway, ScriptedBridge]:
    """A gateway whose answers have reasoning, text and a call, unless other batches are given."""
    bridge = playing(*(batches or letters(CALLED)))
    return gateway_before(bridge, tokenizer=TemplateTokenizer(QWEN3), model=CARD), bridge


async def told(gateway: Gateway, endpoint: Any = responses, call: Any = None, **body: Any) -> Any:
    found = await Client({"tools": [TOOL], **body}).call(endpoint, gateway, **(call or {}))
    if body.get("stream"):
        return json.loads(found.lines[-1].partition("\ndata: ")[2])["response"]
    return found.json


def references(answer: Any) -> list[Any]:
    return [{"type": "item_reference", "id": item["id"]} for item in answer["output"]]


@pytest.mark.parametrize("stream", [False, True])
async def test_items_are_referenced_by_the_next_request(stream: bool):
    """The prompt is the same as with the items themselves."""
    gateway, bridge = calling()
    first = await told(gateway, input="hi", stream=stream)
    call_id = first["output"][2]["call_id"]
    result = {"type": "function_call_output", "call_id": call_id, "output": "42"}
    for items in (first["output"], references(first)):
        second = await told(gateway, input=[USER, *items, result])
        assert second["status"] == "completed", second
    _, itself, referenced = [request.prompt for request in bridge.requests]
    assert referenced == itself
    assert "One moment." in referenced


async def test_items_of_an_answer_that_was_cut_are_kept():
    gateway, _ = calling([last("so", "length")])
    first = await told(gateway, input="hi")
    assert first["status"] == "incomplete"
    assert (await told(gateway, input=references(first)))["object"] == "response"


@pytest.mark.parametrize(
    ("making", "call"),
    [({"store": False}, {}), ({}, {"tenant": "another"}), ({}, {"is_background": True})],
)
async def test_no_other_items_are_found(making: Any, call: Any):
    gateway, _ = calling()
    first = await told(gateway, call=call, input="hi", **making)
    error = (await told(gateway, input=[USER, *references(first)]))["error"]
    assert (error["param"], error["code"]) == ("input[1].id", "item_not_found")
    assert f"'{first['output'][0]['id']}' not found" in error["message"]


async def test_items_of_a_failed_answer_are_not_kept():
    gateway, _ = calling([event("a")], [last("", "failed")])
    assert (await told(gateway, input="hi", stream=True))["status"] == "failed"
    assert gateway.items.num_bytes == 0


async def test_an_id_that_the_server_never_made_is_not_shown():
    found = await answered(input=[{"type": "item_reference", "id": SECRET}])
    assert found.status == 404
    assert SECRET not in found.body.decode()
    assert "Send the item itself" in found.json["error"]["message"]


async def test_a_short_body_makes_no_prompt_of_any_length():
    gateway, _ = calling([last("x" * 4096)])
    gateway.settings = replace(gateway.settings, limits=RequestLimits(body_bytes=64 << 10))
    first = await told(gateway, input="hi")
    error = (await told(gateway, input=references(first) * 99))["error"]
    assert "larger than 65536 bytes together" in error["message"]


async def num_read(gateway: Gateway, bridge: ScriptedBridge, body: Any) -> int:
    """The number of tokens that the engine gets."""
    await told(gateway, **body)
    return len(bridge.requests[-1].prompt_token_ids)


@pytest.mark.parametrize(
    "body",
    [
        {"input": "hi"},
        {"input": "hi", "instructions": "be brief", "stream": True},
        {"input": [USER], "tool_choice": "required", "temperature": 0},
        {"input": "x" * 5000, "truncation": "auto", "max_output_tokens": 9},
    ],
)
async def test_the_tokens_of_the_input_are_counted(body: Any):
    gateway, bridge = calling()
    counted = await told(gateway, input_tokens, **{**body, "stream": False})
    number = await num_read(gateway, bridge, body)
    assert counted == {"object": "response.input_tokens", "input_tokens": number}


async def test_the_tokens_of_referenced_items_are_counted():
    gateway, bridge = calling()
    body = {"input": [USER, *references(await told(gateway, input="hi"))[:2]]}
    counted = await told(gateway, input_tokens, **body)
    assert counted["input_tokens"] == await num_read(gateway, bridge, body)


@pytest.mark.parametrize(
    ("body", "param"),
    [({"input": "x" * 99_999}, "input"), ({}, "input"), ({"input": "a", "model": "b"}, "model")],
)
async def test_what_cannot_be_counted_is_refused(body: Any, param: str):
    gateway, _ = calling()
    assert (await told(gateway, input_tokens, **body))["error"]["param"] == param


async def test_no_response_is_stored():
    found = await Client(id="resp_abc").call(stored_response, gateway_before(playing()))
    assert found.status == 404
    assert found.json["error"]["code"] == "response_not_found"
    assert "not stored" in found.json["error"]["message"]
