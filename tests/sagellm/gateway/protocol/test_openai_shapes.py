"""Every field that openai-python knows is known here; what it sends is read as it was meant."""

import json
from typing import Any, get_type_hints

import httpx2
import msgspec
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

from sagellm.gateway.protocol.bodies import (
    ChatRequest,
    CompletionRequest,
    read_chat,
    read_completion,
)
from sagellm.gateway.protocol.other_apis import REQUEST
from sagellm.gateway.settings import RequestLimits

VLLM = """ignore_eos min_tokens top_k min_p repetition_penalty stop_token_ids
    include_stop_str_in_output skip_special_tokens add_special_tokens truncate_prompt_tokens
    priority request_id cache_salt return_token_ids prompt_logprobs allowed_token_ids bad_words
    return_tokens_as_token_ids continue_final_message chat_template_kwargs structured_outputs
    logit_bias stop"""


def names_of(params: Any) -> set[str]:
    return set(get_type_hints(params))


@pytest.mark.parametrize(
    ("params", "request_"), [(ChatParams, ChatRequest), (CompletionParams, CompletionRequest)]
)
def test_no_field_of_the_api_is_unknown(params: Any, request_: Any) -> None:
    known = {*request_.__struct_fields__, *REQUEST.unbuilt, *REQUEST.taken}
    assert names_of(params) - known == set()
    assert set(VLLM.split()) - known == set()


def sent(call: Any, **fields: Any) -> bytes:
    """The body that openai-python makes of the fields."""
    bodies: list[bytes] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        bodies.append(request.read())
        return httpx2.Response(200, json={})

    with openai.OpenAI(
        api_key="k",
        base_url="http://server/v1",
        http_client=httpx2.Client(transport=httpx2.MockTransport(answer)),
    ) as client:
        call(client)(**fields)
    return bodies[0]


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
STOPS = TEXT.filter(bool)
GENERATION: dict[str, Any] = {
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "max_tokens": st.integers(1, 4096),
    "n": st.integers(1, 16),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": STOPS | st.lists(STOPS, max_size=4),
    "logit_bias": st.dictionaries(
        st.integers(0, 2**31).map(str), st.integers(-100, 100), max_size=5
    ),
    "user": TEXT,
}
IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8)
PROMPTS = (
    STOPS | st.lists(STOPS, min_size=1, max_size=4) | IDS | st.lists(IDS, min_size=1, max_size=4)
)
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), max_size=3)
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant"]),
        "content": TEXT | PARTS,
    },
    optional={"name": TEXT},
)
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
COMPLETIONS = st.fixed_dictionaries(
    {"model": TEXT, "prompt": PROMPTS},
    optional={
        **GENERATION,
        "echo": st.booleans(),
        "logprobs": st.integers(0, 5),
        "suffix": st.none(),
    },
)
CHATS = st.fixed_dictionaries(
    {"model": TEXT, "messages": st.lists(MESSAGES, min_size=1, max_size=4)},
    optional={
        **GENERATION,
        "logprobs": st.just(True),
        "reasoning_effort": st.sampled_from(["low", "high", None]),
        "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}, FORMAT]),
        "tool_choice": st.sampled_from(["none", "auto"]),
        "parallel_tool_calls": st.booleans(),
        "modalities": st.just(["text"]),
    },
)


def same(request: Any, fields: dict[str, Any]) -> bool:
    """Whether the request says what the fields said, leaving out what is not built."""
    names = {*request.__struct_fields__} - {"messages"}
    built = {name: value for name, value in fields.items() if name in names}
    said = msgspec.to_builtins(request)
    return all(_without_nulls(said[name]) == value for name, value in built.items())


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without_nulls(each) for name, each in value.items() if each is not None}


def texts_of(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


@settings(max_examples=50)
@given(COMPLETIONS)
def test_completions_of_openai_python_are_read(fields: dict[str, Any]) -> None:
    body = sent(lambda client: client.completions.create, **fields)
    assert same(read_completion(body, RequestLimits()), fields)


@settings(max_examples=50)
@given(CHATS)
def test_chats_of_openai_python_are_read(fields: dict[str, Any]) -> None:
    body = sent(lambda client: client.chat.completions.create, **fields)
    request = read_chat(body, RequestLimits())
    assert same(request, fields)
    plain = [message["content"] for message in request.conversation]
    assert plain == [texts_of(message) for message in fields["messages"]]


# What load generators and evaluators send, word for word.
COMPLETION_BODIES: dict[str, dict[str, Any]] = {
    "guidellm": {
        "prompt": "a",
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_tokens": 128,
        "max_completion_tokens": 128,
        "stop": None,
        "ignore_eos": True,
    },
    "vllm bench": {
        "model": "m",
        "prompt": "a",
        "repetition_penalty": 1.0,
        "max_tokens": 128,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "ignore_eos": True,
    },
    "lm-eval": {
        "prompt": [[1, 2, 3]],
        "model": "m",
        "max_tokens": 1,
        "logprobs": 1,
        "temperature": 0,
        "seed": 1234,
        "echo": True,
    },
}


@pytest.mark.parametrize("name", COMPLETION_BODIES)
def test_completions_of_other_clients_are_read(name: str) -> None:
    fields = {key: value for key, value in COMPLETION_BODIES[name].items() if value is not None}
    options = fields.pop("stream_options", {})
    body = json.dumps(COMPLETION_BODIES[name]).encode()
    request = read_completion(body, RequestLimits())
    assert same(request, fields)
    assert request.has_usage == options.get("include_usage", False)


def test_chats_of_lm_eval_are_read() -> None:
    message = {"role": "user", "content": "hi", "type": "text"}
    said = {"messages": [message], "model": "m", "max_tokens": 5, "temperature": 0, "seed": 1}
    request = read_chat(json.dumps({**said, "stop": ["\n"]}).encode(), RequestLimits())
    assert request.conversation == [{"role": "user", "content": "hi"}]
