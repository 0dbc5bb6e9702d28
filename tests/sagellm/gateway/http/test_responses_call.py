"""/v1/responses from the body to the answer: tools round trip, structured output, errors, ids."""

import json
from typing import Any

import pytest
from chat_templates import CARD, HERMES, PLAIN, QWEN3, TemplateTokenizer
from gateway_calls import Answered, Client, event, gateway_before, last, playing, post

from sagellm.gateway.gateway import plain_id
from sagellm.gateway.http.endpoints import cancel
from sagellm.gateway.http.responses_call import responses, stored_response
from sagellm.runtime.messages import Request
from sagellm.runtime.sampling import Grammar

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOL = {"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}
CALLED = '<think>hm</think>One moment.<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
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
    shapes = [{**item, "call_id": ""} for item in whole["output"]]
    assert [{**item, "call_id": ""} for item in end["response"]["output"]] == shapes
    assert b"[DONE]" not in streamed.body
    assert streamed.is_whole


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


async def test_no_response_is_stored():
    found = await Client(id="resp_abc").call(stored_response, gateway_before(playing()))
    assert found.status == 404
    assert found.json["error"]["code"] == "response_not_found"
    assert "not stored" in found.json["error"]["message"]
