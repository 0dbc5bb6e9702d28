"""Which tools a chat offers, which it must call, and what is said of a wrong choice."""

import json
import time
from typing import Any

import pytest

from sagellm.chat_formats import ToolSpec, ToolUse
from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.bodies import ChatRequest, read_chat
from sagellm.gateway.protocol.tool_choice import tool_use_of
from sagellm.gateway.settings import RequestLimits

SECRET = "the-prompt-nobody-may-see"


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [named(name) for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def read(*tools: Any, choice: Any = None, **fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": SECRET}]
    said = {"messages": messages, "tools": tools, "tool_choice": choice, **fields}
    return read_chat(json.dumps(said).encode(), RequestLimits())


def use(*tools: Any, choice: Any = None, **fields: Any) -> ToolUse:
    asked = read(*tools, choice=choice, **fields)
    return tool_use_of(asked.tools, asked.tool_choice, parallel=asked.parallel_tool_calls)


def refusal(*tools: Any, choice: Any = None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(*tools, choice=choice)
    assert caught.value.status == 400
    assert SECRET not in caught.value.message
    return caught.value


def test_a_tool_is_told_with_all_that_it_says() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    given = tool("f", description="d", parameters=schema, strict=True)
    spec = ToolSpec(name="f", description="d", parameters=schema, strict=True)
    assert use(given).tools == (spec,)


@pytest.mark.parametrize(
    ("choice", "calls", "must"),
    [
        (None, "fg", False),
        ("auto", "fg", False),
        ("none", "", False),
        ("required", "fg", True),
        (named("g"), "g", True),
        (allowed("auto", "g"), "g", False),
        (allowed("required", "f", "g"), "fg", True),
    ],
)
def test_a_choice_says_which_tools_may_and_must_be_called(
    choice: Any, calls: str, must: bool
) -> None:
    found = use(tool("f"), tool("g"), choice=choice)
    assert "".join(each.name for each in found.allowed) == calls
    assert found.must_call is must


def test_the_model_sees_the_tools_that_it_may_call() -> None:
    both = tool("f"), tool("g")
    assert len(read(*both, choice=named("g")).offered_tools) == 2
    assert read(*both, choice="none").offered_tools == []
    (only,) = read(*both, choice=allowed("auto", "g")).offered_tools
    assert only.function.name == "g"


def test_calls_may_be_parallel_unless_the_request_says_otherwise() -> None:
    assert use(tool("f")).parallel
    assert use(tool("f"), parallel_tool_calls=None).parallel
    assert not use(tool("f"), parallel_tool_calls=False).parallel


def test_a_named_tool_is_called_once() -> None:
    named = {"type": "function", "function": {"name": "f"}}
    assert not use(tool("f"), tool_choice=named).parallel


@pytest.mark.parametrize("choice", [None, "none", "auto"])
def test_without_tools_a_choice_does_no_harm(choice: Any) -> None:
    assert not use(choice=choice).allowed


@pytest.mark.parametrize(
    ("choice", "param", "says"),
    [
        (named("get_wether"), "tool_choice.function.name", "did you mean `get_weather`?"),
        (named(SECRET), "tool_choice.function.name", "is none of the 1 tools"),
        (named("x" * 10**6), "tool_choice.function.name", "is none of the 1 tools"),
        (
            allowed("auto", "get_weather", "f"),
            "tool_choice.allowed_tools.tools[1].function.name",
            "is none of",
        ),
        (allowed("none", "get_weather"), "tool_choice.allowed_tools.mode", "one of auto, required"),
        (allowed("auto"), "tool_choice.allowed_tools.tools", "length >= 1"),
        ("any", "tool_choice", "must be one of none, auto, required"),
        (SECRET, "tool_choice", "must be one of none, auto, required"),
        ({"type": [SECRET]}, "tool_choice.type", "expected `str`"),
        ({"type": SECRET}, "tool_choice.type", "must be one of function, allowed_tools"),
        ({"type": "function"}, "tool_choice.function", "is missing"),
        ({"type": "function", "name": "get_weather"}, "tool_choice.name", "send it in `function`"),
        (named(5), "tool_choice.function.name", "expected `str`"),
        (5, "tool_choice", "expected `str | object | null`"),
    ],
)
def test_a_wrong_choice_is_refused_by_its_place(choice: Any, param: str, says: str) -> None:
    error = refusal(tool("get_weather"), choice=choice)
    assert error.param == param
    assert says in error.message


def test_a_wrong_name_is_not_compared_for_long() -> None:
    tools = [tool(f"t{number:03d}".ljust(64, "x")) for number in range(1024)]
    started = time.process_time()
    error = refusal(*tools, choice=named("tq".ljust(64, "x")))
    assert time.process_time() - started < 0.25
    assert "did you mean" in error.message


@pytest.mark.parametrize("choice", ["required", named("f")])
def test_a_call_without_tools_cannot_be_made(choice: Any) -> None:
    error = refusal(choice=choice)
    assert error.param is not None
    assert error.param.startswith("tool_choice")
    assert "there are no `tools`" in error.message
