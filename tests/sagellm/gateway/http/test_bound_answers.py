"""Grammars of requests: what reaches the engine, what is refused, and by which field."""

import json
from dataclasses import replace
from typing import Any

import pytest
from chat_templates import CARD, GEMMA4, HERMES, LLAMA3, PLAIN, QWEN3, TemplateTokenizer, tool
from gateway_calls import Answered, last, playing, post

from sagellm.gateway import grammar_checks
from sagellm.gateway.http import bound_answers
from sagellm.gateway.http.endpoints import chat, completions
from sagellm.runtime.grammars.grammar_compiler import check_grammar
from sagellm.runtime.messages import Request
from sagellm.runtime.sampling import Grammar

SECRET = "the-schema-nobody-may-see"
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
WRONG = {"type": "object", "properties": {"age": {"type": SECRET}}}
TOOLS = [tool("f", x=0), tool("g")]
F = {"type": "function", "function": {"name": "f"}}


class _Special(TemplateTokenizer):
    """Token 7 is special."""

    special_token_ids = frozenset({7})


async def asked(template: str, **fields: Any) -> Request:
    bridge = playing([last(), last(choice=1)])
    answered = await refused(template, bridge, **fields)
    assert answered.status == 200, answered.body
    return bridge.requests[0]


async def refused(
    template: str, bridge: Any = None, *, card: Any = CARD, **fields: Any
) -> Answered:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    tokenizer = _Special(template)
    return await post(chat, bridge or playing(), body, tokenizer=tokenizer, model=card)


def error(answered: Answered) -> Any:
    assert answered.status == 400, answered.body
    assert SECRET not in answered.json["error"]["message"]
    return answered.json["error"]


async def test_a_completion_is_bound_in_each_of_its_prompts():
    bridge = playing([last()])
    body = {"prompt": ["a", "bb"], "structured_outputs": {"json": SCHEMA}, "max_tokens": 5}
    answered = await post(completions, bridge, body, model=CARD)
    assert answered.status == 200
    grammars = [request.sampling.grammar for request in bridge.requests]
    assert grammars == [Grammar(kind="json_schema", text=TEXT)] * 2


async def test_a_chat_is_bound_as_its_format_says():
    request = await asked(PLAIN, response_format=FORMAT)
    assert request.sampling.grammar == Grammar(kind="json_schema", text=TEXT)
    thinking = await asked(QWEN3, response_format=FORMAT)
    assert thinking.sampling.grammar is not None
    assert "</think>" in thinking.sampling.grammar.text


async def test_without_thinking_the_prompt_ends_the_reasoning():
    request = await asked(QWEN3, response_format=FORMAT, reasoning_effort="none")
    assert request.sampling.grammar == Grammar(kind="json_schema", text=TEXT)


@pytest.mark.parametrize("choice", ["auto", "none", None])
async def test_a_call_that_need_not_be_made_binds_nothing(choice):
    request = await asked(HERMES, tools=TOOLS, tool_choice=choice)
    assert request.sampling.grammar is None


@pytest.mark.parametrize(("choice", "names"), [("required", "fg"), (F, "f")])
async def test_a_call_that_must_be_made_binds_the_answer(choice, names):
    grammar = (await asked(HERMES, tools=TOOLS, tool_choice=choice)).sampling.grammar
    assert grammar is not None
    check_grammar(grammar)
    assert "".join(name for name in "fg" if f'\\"{name}\\"' in grammar.text) == names


async def test_a_strict_tool_is_bound_though_it_need_not_be_called():
    strict = {"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}
    grammar = (await asked(HERMES, tools=[strict])).sampling.grammar
    assert grammar is not None
    check_grammar(grammar)


async def test_a_required_call_goes_before_a_response_format():
    both = await asked(HERMES, tools=TOOLS, tool_choice="required", response_format=FORMAT)
    alone = await asked(HERMES, tools=TOOLS, tool_choice="required")
    assert both.sampling.grammar == alone.sampling.grammar


async def test_tools_that_may_not_be_called_stand_beside_a_response_format():
    request = await asked(HERMES, tools=TOOLS, tool_choice="none", response_format=FORMAT)
    assert request.sampling.grammar == Grammar(kind="json_schema", text=TEXT)


async def test_the_other_ways_to_choose_tokens_stay():
    fields = {"logit_bias": {"65": 1}, "allowed_token_ids": [65, 66], "bad_words": ["B"]}
    more = {"n": 2, "min_tokens": 2, "stop": ["x"], "ignore_eos": True, "logprobs": True}
    sampling = (await asked(PLAIN, response_format=FORMAT, **fields, **more)).sampling
    assert sampling.grammar is not None
    assert (sampling.allowed_token_ids, sampling.logit_bias) == ((65, 66), {65: 1.0})
    assert (sampling.n, sampling.stop, sampling.bad_words_token_ids) == (2, ("x",), ((66,),))


@pytest.mark.parametrize(
    ("template", "fields", "skips"),
    [
        (HERMES, {}, True),
        (HERMES, {"tools": TOOLS}, False),
        (HERMES, {"tools": TOOLS, "tool_choice": "none"}, True),
        (QWEN3, {}, False),
        (PLAIN, {}, True),
        (PLAIN, {"skip_special_tokens": False}, False),
    ],
)
async def test_a_parser_gets_special_tokens(template, fields, skips):
    assert (await asked(template, **fields)).sampling.skip_special_tokens is skips


@pytest.mark.parametrize(("skips", "content"), [(True, "ab"), (False, "a<0x07>b")])
async def test_the_content_has_special_tokens_where_the_client_asked_for_them(skips, content):
    answered = await refused(
        HERMES, playing([last("a<0x07>b")]), tools=TOOLS, skip_special_tokens=skips
    )
    assert answered.json["choices"][0]["message"]["content"] == content


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"response_format": {**FORMAT, "json_schema": {"name": "n", "schema": WRONG}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"json": WRONG}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": SECRET + "("}}, "structured_outputs.regex"),
        ({"guided_grammar": "start: " + SECRET}, "guided_grammar"),
        ({"ebnf": "root ::= (" + SECRET}, "ebnf"),
        ({"guided_choice": ["a" * 200] * 8192}, "guided_choice"),
    ],
)
async def test_a_grammar_that_cannot_be_used_is_refused_by_its_field(fields, param):
    found = error(await refused(PLAIN, **fields))
    assert (found["param"], found["code"]) == (param, "invalid_grammar")
    answered = await post(completions, playing(), {"prompt": "a", **fields}, model=CARD)
    assert error(answered)["param"] == param


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "h"}}])
async def test_wrong_parameters_are_refused_by_their_tool_where_they_bind(choice):
    wrong = {"type": "function", "function": {"name": "h", "parameters": WRONG}}
    found = error(await refused(HERMES, tools=[*TOOLS, wrong], tool_choice=choice))
    assert (found["param"], found["code"]) == ("tools[2].function.parameters", "invalid_grammar")
    assert (await refused(HERMES, playing([last()]), tools=[*TOOLS, wrong])).status == 200


async def test_a_refusal_names_the_place_in_the_parameters_of_a_tool():
    parameters = {"properties": {"tags": {"items": {"not": {"type": "null"}}}}}
    function = {"name": "h", "parameters": parameters, "strict": True}
    odd = {"type": "function", "function": function}
    found = error(await refused(HERMES, tools=[*TOOLS, odd]))
    assert found["param"] == "tools[2].function.parameters"
    assert "(at $.properties.tags.items.not)" in found["message"]


async def test_a_wrong_tool_has_its_place_among_all_tools_that_were_sent():
    wrong = {"type": "function", "function": {"name": "h", "parameters": WRONG}}
    few = {"mode": "required", "tools": [F, {"type": "function", "function": {"name": "h"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": few}
    found = error(await refused(HERMES, tools=[*TOOLS, wrong], tool_choice=choice))
    assert found["param"] == "tools[2].function.parameters"


async def test_a_thousand_tools_are_offered_and_may_be_too_many_to_bind(monkeypatch):
    many = [tool(f"tool_{number}", x=number) for number in range(1024)]
    card = replace(CARD, max_model_len=1 << 20)
    assert (await refused(HERMES, playing([last()]), tools=many, card=card)).status == 200
    monkeypatch.setattr(grammar_checks, "CHECK_S", 60.0)
    found = error(await refused(HERMES, tools=many, tool_choice="required", card=card))
    assert (found["param"], found["code"]) == ("tools", "invalid_grammar")
    assert "send fewer tools" in found["message"]


def _chain(length: int) -> dict[str, Any]:
    """A schema whose objects lead to each other."""
    kinds = [{"$ref": f"#/$defs/{at + 1}"} for at in range(length)]
    refs = [{"type": "object", "properties": {"x": kind}} for kind in kinds]
    return {"$defs": dict(enumerate(refs)), "properties": {"x": {"$ref": "#/$defs/0"}}}


@pytest.mark.parametrize(
    ("template", "parameters"),
    [(GEMMA4, _chain(2000)), (GEMMA4, {"required": 5}), (HERMES, {"format": []})],
)
async def test_parameters_that_are_too_deep_or_no_schema_are_refused(
    template, parameters, monkeypatch
):
    monkeypatch.setattr(grammar_checks, "CHECK_S", 60.0)  # a collection may take longer
    odd = {"type": "function", "function": {"name": "h", "parameters": parameters}}
    found = error(await refused(template, tools=[*TOOLS, odd], tool_choice="required"))
    assert (found["param"], found["code"]) == ("tools[2].function.parameters", "invalid_grammar")


async def test_a_schema_that_a_strict_tool_cannot_keep_is_refused():
    parameters = {"type": "object", "properties": {"x": {"not": {"type": "null"}}}}
    lax = {"type": "function", "function": {"name": "h", "parameters": parameters}}
    strict = {"type": "function", "function": {**lax["function"], "strict": True}}
    found = error(await refused(HERMES, tools=[*TOOLS, strict]))
    assert (found["param"], found["code"]) == ("tools[2].function.parameters", "invalid_grammar")
    assert (await refused(HERMES, playing([last()]), tools=[*TOOLS, lax])).status == 200


@pytest.mark.parametrize("fields", [{"response_format": FORMAT}, {"guided_regex": "a"}])
async def test_an_answer_beside_tools_is_calls_or_has_the_form(fields):
    grammar = (await asked(HERMES, tools=TOOLS, **fields)).sampling.grammar
    assert grammar is not None
    check_grammar(grammar)
    assert "calls | response" in grammar.text
    assert "<tool_call>" in grammar.text


async def test_a_wrong_form_beside_tools_is_refused_by_its_field():
    wrong = {**FORMAT, "json_schema": {"name": "n", "schema": WRONG}}
    found = error(await refused(HERMES, tools=TOOLS, response_format=wrong))
    assert found["param"] == "response_format.json_schema.schema"


@pytest.mark.parametrize("choice", ["auto", "required", F])
async def test_a_template_without_tools_gets_none(choice):
    found = error(await refused(PLAIN, tools=TOOLS, tool_choice=choice))
    assert (found["param"], found["code"]) == ("tools", "unsupported_parameter")
    assert "knows no tools" in found["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": FORMAT}, "response_format.json_schema.schema"),
        ({"regex": "a"}, "regex"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
    ],
)
async def test_an_engine_that_takes_no_grammars_gets_none(fields, param):
    card = replace(CARD, takes_grammars=False)
    found = error(await refused(LLAMA3, card=card, **fields))
    assert (found["param"], found["code"]) == (param, "unsupported_parameter")
    assert (await refused(LLAMA3, playing([last()]), card=card, tools=TOOLS)).status == 200


def test_a_grammar_that_takes_too_long_is_refused(run, monkeypatch):
    monkeypatch.setattr(bound_answers, "check_grammar", _spin)
    monkeypatch.setattr(grammar_checks, "CHECK_S", 0.05)
    body = {"prompt": "a", "regex": "a"}
    found = error(run(lambda: post(completions, playing(), body, model=CARD)))
    assert (found["param"], found["code"]) == ("regex", "invalid_grammar")
    assert "0.05 s of CPU time" in found["message"]


def _spin(grammar: Grammar) -> None:
    """Use about a second of CPU time, and give the loop its turns: it may wait for a core."""
    for _ in range(12_000_000):
        grammar.text.upper()
