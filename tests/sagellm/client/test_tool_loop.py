from typing import Any

import pytest

from sagellm.client.replies import (
    Choice,
    ResponseBody,
    ResponseFunction,
    ResponseMessage,
    ResponseToolCall,
    TextReply,
    whole_reply,
)
from sagellm.client.responses import CUT_OFF, MISUSED, ClientError
from sagellm.client.tool_loop import TOO_MANY_ROUNDS, ToolLoop, ToolRun, ToolsUnfinished

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def reply(text: str = "", *names: str, reason: str = "tool_calls") -> TextReply:
    """A reply with a text, or with calls of these tools."""
    calls = tuple(
        ResponseToolCall(ResponseFunction(name, '{"city":"Paris"}'), f"call_{number}")
        for number, name in enumerate(names)
    )
    message = ResponseMessage("assistant", text, tool_calls=calls)
    choice = Choice(message=message, finish_reason=reason if calls else "stop")
    return whole_reply(ResponseBody(choices=(choice,)))


def test_calls_and_results_join_the_messages_in_order() -> None:
    loop = ToolLoop(ASK, [get_weather], {})
    for call in loop.take(reply("", "get_weather", "get_weather")):
        loop.add_result(call, loop.box.run(call))
    assert loop.take(reply("It is sunny.")) == ()
    question, asked, *results, answer = loop.messages
    assert question == ASK[0]
    assert [call["id"] for call in asked["tool_calls"]] == ["call_0", "call_1"]
    assert [one["tool_call_id"] for one in results] == ["call_0", "call_1"]
    assert results[0]["content"] == "sunny in Paris"
    assert answer == {"role": "assistant", "content": "It is sunny."}


def test_the_callers_messages_stay_as_they_are() -> None:
    messages: list[dict[str, Any]] = [dict(ASK[0])]
    ToolLoop(messages, [get_weather], {}).take(reply("Hello"))
    assert messages == ASK


@pytest.mark.parametrize(
    ("choice", "later"), [("required", "auto"), ("auto", "auto"), ("none", "none"), (None, None)]
)
def test_a_forced_call_is_forced_once(choice: str | None, later: str | None) -> None:
    loop = ToolLoop(ASK, [get_weather], {} if choice is None else {"tool_choice": choice})
    assert loop.fields.get("tool_choice") == choice
    loop.take(reply("", "get_weather"))
    assert loop.fields.get("tool_choice") == later
    assert loop.fields["tools"][0]["function"]["name"] == "get_weather"


def test_tools_that_are_not_allowed_stay_so_in_later_rounds() -> None:
    allowed = [{"type": "function", "function": {"name": "get_weather"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": allowed}}
    loop = ToolLoop(ASK, [get_weather], {"tool_choice": choice})
    assert loop.fields["tool_choice"] == choice
    loop.take(reply("", "get_weather"))
    later = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": allowed}}
    assert loop.fields["tool_choice"] == later


@pytest.mark.parametrize("form", [{"regex": "[0-9]+"}, {"response_format": {"type": "text"}}])
def test_an_answer_in_a_form_is_asked_for_by_a_call_of_its_own(form: dict[str, Any]) -> None:
    loop = ToolLoop(ASK, [get_weather], form)
    loop.take(reply("", "get_weather"))
    assert (loop.has_answer_next, loop.fields.keys() & form.keys()) == (False, set())
    loop.take(reply("It is sunny."))
    assert (loop.has_answer_next, loop.is_over) == (True, False)
    assert loop.fields.items() >= {**form, "tool_choice": "none"}.items()
    loop.take(reply("21"))
    assert loop.is_over
    assert [one["content"] for one in loop.messages if one["role"] == "assistant"] == [None, "21"]


def test_without_tools_the_first_answer_has_the_form() -> None:
    loop = ToolLoop(ASK, [], {"regex": "[0-9]+", "temperature": 0})
    assert loop.fields == {"regex": "[0-9]+", "temperature": 0}
    loop.take(reply("21"))
    assert loop.is_over


def test_the_last_round_must_answer() -> None:
    loop = ToolLoop(ASK, [get_weather], {}, max_rounds=2)
    (call,) = loop.take(reply("", "get_weather"))
    loop.add_result(call, "sunny")
    with pytest.raises(ToolsUnfinished, match="in round 2; raise max_rounds") as caught:
        loop.take(reply("", "get_weather"))
    assert caught.value.code == TOO_MANY_ROUNDS
    assert [one["role"] for one in caught.value.messages] == ["user", "assistant", "tool"]


def test_a_call_that_is_cut_off_is_not_made() -> None:
    with pytest.raises(ClientError, match="inside a tool call") as caught:
        ToolLoop(ASK, [get_weather], {}).take(reply("", "get_weather", reason="length"))
    assert caught.value.code == CUT_OFF


@pytest.mark.parametrize(
    ("options", "rounds", "said"),
    [({"stream": True}, 8, "no stream"), ({"n": 2}, 8, "no n"), ({}, 0, "max_rounds is 0")],
)
def test_a_loop_of_another_kind_is_refused(options: Any, rounds: int, said: str) -> None:
    with pytest.raises(ClientError, match=said) as caught:
        ToolLoop(ASK, [get_weather], options, max_rounds=rounds)
    assert caught.value.code == MISUSED


def test_a_run_shows_its_answer() -> None:
    run: ToolRun = ToolRun(reply("It is sunny."), [])
    assert (run.text, str(run)) == ("It is sunny.", "It is sunny.")
