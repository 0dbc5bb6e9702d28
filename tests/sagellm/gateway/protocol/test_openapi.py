"""The OpenAPI document: sound, with ranges that hold, and no surprise for what it allows."""

import json
from dataclasses import dataclass
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.anthropic_body import read_count_body, read_messages_body
from sagellm.gateway.protocol.anthropic_chat import chat_of
from sagellm.gateway.protocol.bodies import (
    read_chat,
    read_completion,
    read_detokenize,
    read_tokenize,
)
from sagellm.gateway.protocol.openapi import OPERATIONS, openapi
from sagellm.gateway.protocol.responses_body import read_responses
from sagellm.gateway.protocol.responses_fields import ReasoningItem
from sagellm.gateway.settings import RequestLimits


@dataclass(frozen=True)
class Route:
    method: str
    path: str
    access: str = "user"


def read_messages(body: bytes, limits: RequestLimits) -> None:
    chat = chat_of(read_messages_body(body, limits))
    with chat.naming():
        chat.read(limits)


def read_items(body: bytes, limits: RequestLimits) -> None:
    """Read a body of /v1/responses as a server that has any item."""
    read_responses(body, limits, lambda item_id, place: ReasoningItem())


READERS = {
    "/v1/completions": read_completion,
    "/v1/chat/completions": read_chat,
    "/v1/responses": read_items,
    "/v1/messages": read_messages,
    "/v1/messages/count_tokens": read_count_body,
    "/tokenize": read_tokenize,
    "/detokenize": read_detokenize,
}
ROUTES = [
    *(Route("POST" if known.takes else "GET", path) for path, known in OPERATIONS.items()),
    Route("POST", "/ping", "open"),
    Route("POST", "/v1/sagellm/{deep:path}", "admin"),
]
DOCUMENT = openapi(ROUTES, "1.2.3")
LOADED = schemathesis.openapi.from_dict(DOCUMENT)


def validator(path: str) -> Any:
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]
    schema = {**content["application/json"]["schema"], "components": DOCUMENT["components"]}
    return jsonschema_rs.Draft202012Validator(schema)


def test_every_reference_leads_somewhere() -> None:
    text = json.dumps(DOCUMENT)
    for part in text.split('"$ref": "#/components/')[1:]:
        kind, _, name = part.partition('"')[0].partition("/")
        assert name in DOCUMENT["components"][kind]


def test_every_schema_is_one() -> None:
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema)


def test_every_route_is_there() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    assert DOCUMENT["info"]["version"] == "1.2.3"
    assert set(DOCUMENT["paths"]["/ping"]) == {"get", "post"}
    deep = DOCUMENT["paths"]["/v1/sagellm/{deep}"]["post"]
    assert [one["name"] for one in deep["parameters"]] == ["deep"]
    ids = [one["operationId"] for methods in DOCUMENT["paths"].values() for one in methods.values()]
    assert len(ids) == len(set(ids)) == len(ROUTES)


def test_input_tokens_takes_the_body_of_a_response() -> None:
    counted, made = (
        DOCUMENT["paths"][path]["post"] for path in ("/v1/responses/input_tokens", "/v1/responses")
    )
    assert counted["requestBody"] == made["requestBody"]
    (content,) = counted["responses"]["200"]["content"].values()
    assert content["schema"]["$ref"].endswith("/CountedInput")


@pytest.mark.parametrize(
    ("access", "needs_key", "ways"),
    [
        ("user", True, ["user", "admin"]),
        ("metrics", True, ["user", "admin"]),
        ("open", True, []),
        ("user", False, []),
        ("admin", True, ["admin"]),
        ("admin", False, ["admin"]),
    ],
)
def test_who_may_enter_is_said(access: str, needs_key: bool, ways: list[str]) -> None:
    document = openapi([Route("GET", "/x", access)], "1", needs_key=needs_key)
    security = document["paths"]["/x"]["get"]["security"]
    assert [name for way in security for name in way] == ways
    assert set(ways) <= set(document["components"]["securitySchemes"])


def test_the_operators_limits_are_in_it() -> None:
    limits = RequestLimits(
        num_choices=3, num_stop=2, num_prompts=4, num_messages=5, num_logit_bias=6
    )
    document = openapi([], "1", limits)
    chat = document["components"]["schemas"]["ChatRequest"]["properties"]
    text = json.dumps(chat)
    for bound in ('"maximum": 3', '"maxItems": 2', '"maxItems": 5', '"maxProperties": 6'):
        assert bound in text
    prompt = document["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
    assert json.dumps(prompt).count('"maxItems": 4') == 2


USER = {"role": "user", "content": "a"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
FLAT = {"type": "function", "name": "f", "parameters": None}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}, "index": 0}

NAMED = {"type": "function", "function": {"name": "f"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
}

MESSAGES = {"max_tokens": 5, "messages": [USER]}
USE = {"type": "tool_use", "id": "c", "name": "f", "input": {}, "caller": {"type": "direct"}}
GOOD: list[tuple[str, Any]] = [
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 16, "stop": None}),
    ("/v1/completions", {"prompt": "a", "n": None, "temperature": None, "max_tokens": None}),
    ("/v1/completions", {"prompt": [1, 2], "logit_bias": {"5": 1.5}, "best_of": None}),
    ("/v1/completions", {"prompt": [[1], [2]], "tools": None, "store": False}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [], "refusal": None}]}),
    ("/v1/completions", {"prompt": "a", "best_of": 1, "max_tokens": 0, "echo": True}),
    ("/v1/completions", {"prompt": "a", "nobody_knows_it": None, "timeout": 2.5}),
    ("/v1/completions", {"prompt": "a", "logprobs": 20, "prompt_logprobs": 20}),
    ("/v1/chat/completions", {"messages": [USER], "tools": [], "tool_choice": "auto"}),
    ("/v1/chat/completions", {"messages": [USER], "tools": [TOOL], "tool_choice": "none"}),
    ("/v1/chat/completions", {"messages": [USER], "echo": False, "best_of": 1, "reasoning": {}}),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": [CALL]}, USER]}),
    ("/v1/chat/completions", {"messages": [{**USER, "id": "m1", "reasoning_content": "so"}]}),
    ("/v1/chat/completions", {"messages": [USER], "chat_template_kwargs": {"thinking": True}}),
    ("/v1/chat/completions", {"messages": [USER], "tools": [TOOL], "tool_choice": "required"}),
    ("/v1/chat/completions", {"messages": [USER], "tools": [TOOL], "tool_choice": NAMED}),
    ("/v1/chat/completions", {"messages": [USER], "tools": [TOOL], "tool_choice": ALLOWED}),
    ("/v1/chat/completions", {"messages": [USER], "response_format": {"type": "json_object"}}),
    ("/v1/chat/completions", {"messages": [USER], "response_format": FORMAT}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": ["a", "b"]}}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": {}, "regex": None}}),
    ("/v1/completions", {"prompt": "a", "guided_json": "{}", "ebnf": None}),
    ("/v1/responses", {"input": "a"}),
    ("/v1/responses", {"input": [USER, {**USER, "type": "message", "id": None}]}),
    ("/v1/responses", {"input": [{"type": "item_reference", "id": "a"}, {"id": "b"}]}),
    ("/v1/responses", {"input": "a", "store": True, "background": False, "top_k": 3}),
    ("/v1/responses", {"input": "a", "max_output_tokens": None, "text": {"format": None}}),
    ("/v1/responses", {"input": "a", "stream_options": {"include_obfuscation": False}}),
    (
        "/v1/responses",
        {"input": "a", "tools": [FLAT], "tool_choice": {"type": "function", "name": "f"}},
    ),
    ("/v1/messages", MESSAGES),
    ("/v1/messages", {**MESSAGES, "system": [{"type": "text", "text": "a"}], "tools": None}),
    (
        "/v1/messages",
        {**MESSAGES, "messages": [USER, {"role": "assistant", "content": [USE]}, USER]},
    ),
    ("/v1/messages", {**MESSAGES, "tools": [{"name": "f", "input_schema": {}}], "container": None}),
    ("/v1/messages", {**MESSAGES, "thinking": {"type": "disabled", "display": None}}),
    ("/v1/messages/count_tokens", {"messages": [USER], "speed": "standard"}),
    ("/tokenize", {"prompt": "a"}),
    ("/tokenize", {"messages": [USER], "tools": [TOOL], "add_generation_prompt": False}),
    ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "chat_template": None}),
    ("/detokenize", {"tokens": [1]}),
]
BAD: list[tuple[str, Any]] = [
    ("/v1/responses", {"input": []}),
    ("/v1/responses", {"input": [{"role": "tool", "content": "a"}]}),
    ("/v1/responses", {"input": [{"type": "item_reference"}]}),
    ("/v1/responses", {"input": "a", "store": "no"}),
    ("/v1/responses", {"input": "a", "previous_response_id": "resp_1"}),
    ("/v1/responses", {"input": "a", "tools": [{"type": "web_search"}]}),
    ("/v1/responses", {"input": "a", "max_output_tokens": 0}),
    ("/v1/responses", {"input": "a", "max_tokens": 5}),
    ("/v1/completions", {}),
    ("/v1/completions", {"prompt": ""}),
    ("/v1/completions", {"prompt": ["a", 1]}),
    ("/v1/completions", {"prompt": ["a"] * 1025}),
    ("/v1/completions", {"prompt": "a", "n": 17}),
    ("/v1/completions", {"prompt": "a", "n": 0}),
    ("/v1/completions", {"prompt": "a", "temperature": -1}),
    ("/v1/completions", {"prompt": "a", "top_p": 0}),
    ("/v1/completions", {"prompt": "a", "logprobs": 21}),
    ("/v1/completions", {"prompt": "a", "best_of": 2}),
    ("/v1/completions", {"prompt": "a", "allowed_token_ids": []}),
    ("/v1/completions", {"prompt": "a", "bad_words": [""]}),
    ("/v1/completions", {"prompt": "a", "store": 1}),
    ("/v1/completions", {"prompt": "a", "tools": [TOOL]}),
    ("/v1/chat/completions", {"messages": [USER], "echo": True}),
    ("/v1/chat/completions", {"messages": [USER], "max_tokens": 0}),
    ("/v1/chat/completions", {"messages": [USER], "tool_choice": "any"}),
    ("/v1/chat/completions", {"messages": [USER], "tool_choice": {"type": "custom"}}),
    ("/v1/chat/completions", {"messages": [USER], "response_format": {"type": "xml"}}),
    ("/v1/chat/completions", {"messages": [USER], "response_format": {"type": "text", "a": 1}}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"regexp": "a"}}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"whitespace_pattern": " "}}),
    ("/v1/chat/completions", {"messages": [USER], "chat_template_kwargs": {"a": []}}),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": None}]}),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": []}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "tool_calls": [CALL]}]}),
    ("/v1/chat/completions", {"messages": [{**USER, "cache_control": "x"}]}),
    ("/v1/completions", {"prompt": "a", "stop": ["x"] * 17}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"a": 1}}),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}),
    ("/v1/completions", {"prompt": "a", "max_tokns": 1}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/chat/completions", {"messages": [{"role": "function", "content": "a"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}),
    ("/v1/messages", {"messages": [USER]}),
    ("/v1/messages", {**MESSAGES, "messages": [{"role": "user", "content": [USE]}]}),
    ("/v1/messages", {**MESSAGES, "messages": [{"role": "user", "content": [{"type": "image"}]}]}),
    ("/v1/messages", {**MESSAGES, "tools": [{"type": "bash_20250124", "name": "bash"}]}),
    ("/v1/messages", {**MESSAGES, "thinking": {"type": "often"}}),
    ("/v1/messages", {**MESSAGES, "stop_sequences": ["x"] * 17}),
    ("/v1/messages", {**MESSAGES, "top_k": -1}),
    ("/v1/messages/count_tokens", MESSAGES),
    ("/tokenize", {"prompt": 5}),
    ("/detokenize", {"tokens": [-1]}),
]


@pytest.mark.parametrize(("path", "body"), GOOD)
def test_the_schema_allows_what_is_read(path: str, body: Any) -> None:
    READERS[path](json.dumps(body).encode(), RequestLimits())
    assert validator(path).is_valid(body)


@pytest.mark.parametrize(("path", "body"), BAD)
def test_the_schema_forbids_what_is_refused(path: str, body: Any) -> None:
    with pytest.raises(ApiError):
        READERS[path](json.dumps(body).encode(), RequestLimits())
    assert not validator(path).is_valid(body)


# What no schema says: fields that need each other, and characters that JSON cannot carry well.
UNSAID = (
    "top_logprobs: needs",
    "max_completion_tokens is",
    "truncate_prompt_tokens: is 0",
    "bytes in one string",
    "max_tokens: is 0",
    "is the name of an earlier tool",
    "but there are no `tools`",
    "is none of the",
    "must have exactly one of",
    "; give one of them",
    "json_schema: is missing",
    "is only for the type `json_schema`",
    "stands beside continue_final_message",
    "continue_final_message: needs",
    "there is none with a name",
    "budget_tokens: is missing",
    "tool_choice.name: is",
    "tool_choice: wants a call",
    "is a call without an answer",
    "stands beside `output_config.format`",
    "has a NUL",
    "lone surrogate",
    "integer -0",
    "an integer of more than",
    "64-bit floats",
)


def surprise(path: str, body: Any) -> str | None:
    """Why the body was refused, unless no schema could have said it."""
    try:
        READERS[path](json.dumps(body).encode(), RequestLimits())
    except ApiError as error:
        return None if any(why in error.message for why in UNSAID) else error.message
    return None


@pytest.mark.parametrize("path", READERS)
def test_what_the_schema_allows_is_no_surprise(path: str) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        case = data.draw(LOADED[path]["POST"].as_strategy())
        assert surprise(path, case.body) is None

    holds()
