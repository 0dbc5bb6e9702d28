"""Answers from the grammars of all formats parse back to valid calls."""

import json
from itertools import product
from typing import Any

import jsonschema_rs
import pytest
from answer_parsing import (
    REQUIRED,
    TIME,
    USE,
    WEATHER,
    ByteTokens,
    Walk,
    calls_in,
    named,
    parsed,
)

from sagellm.chat_formats import FORMATS, NO_TOOLS, Content, ToolSpec, ToolUse, UnboundSchema
from sagellm.runtime.sampling import Grammar

RICH: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "short": {"type": "string", "minLength": 2, "maxLength": 4},
        "unit": {"enum": ["C", 'F"', "K e"]},
        "size": {"type": "integer", "minimum": 2, "maximum": 99},
        "flags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "place": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "name": {"type": "string"}},
            "required": ["x"],
            "additionalProperties": False,
        },
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "tree": {"$ref": "#/$defs/tree"},
    },
    "required": ["text", "size", "place"],
    "additionalProperties": False,
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {"next": {"$ref": "#/$defs/tree"}},
            "additionalProperties": False,
        }
    },
}
TOOLS = (WEATHER, TIME, ToolSpec(name="rich", parameters=RICH))
SCHEMAS = {tool.name: {"type": "object", **(tool.parameters or {})} for tool in TOOLS}
DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>")
KIMI = ("<|tool_calls_section_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>")
SPECIAL = {
    "harmony": ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"),
    "gemma4": ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"),
    "function_gemma": ("<start_function_call>", "<end_function_call>", "<escape>"),
    "qwen3_5": (),
    "qwen3_coder": (),
    "qwen3": (),
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3": ("<|python_tag|>",),
    "glm": ("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    "pythonic": ("<|python_start|>", "<|python_end|>"),
    "magistral": ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"),
    "magistral_2506": ("[TOOL_CALLS]", "[ARGS]"),
    "mistral": ("[TOOL_CALLS]", "[ARGS]"),
    "mistral_list": ("[TOOL_CALLS]",),
    **dict.fromkeys(("deepseek_v3", "deepseek_r1", "deepseek_v3_1"), DEEPSEEK),
    **dict.fromkeys(("kimi_k2", "kimi_k2_thinking"), KIMI),
}
HINTS = (
    *("</parameter>", "<escape>", '<|"|>', "</think>", "<channel|>", "</tool_call>", "[/THINK]"),
    *(
        "\n</parameter>",
        "commentary to=functions.time ",
        "<|end|>",
        "<tool_call>",
        "<|tool_call>",
        "<start_function_call>",
        "[TOOL_CALLS]",
    ),
)
GLM_HINTS = ("</arg_value>", "</think>", "<tool_call>", "</tool_call>")
BEGINNINGS = {
    **dict.fromkeys(("hermes", "qwen3", "qwen3_coder", "qwen3_5", "glm"), "Hm.\n<tool_call>"),
    "harmony": "<|channel|>commentary to=functions.",
    "gemma4": "Hm.<|tool_call>",
    "function_gemma": "Hm.<start_function_call>",
    "llama3": '{"name',
    "pythonic": "[",
    **dict.fromkeys(("deepseek_v3", "deepseek_r1", "deepseek_v3_1"), f"Hm.{DEEPSEEK[0]}"),
    **dict.fromkeys(("kimi_k2", "kimi_k2_thinking"), f"Hm.{KIMI[0]}"),
}
SEEDS = range(6)


def walked(name: str, tokens: ByteTokens, grammar: Grammar, seed: int, begin: str = "") -> str:
    return Walk(tokens, grammar, seed, GLM_HINTS if name == "glm" else HINTS, begin).text()


def tokens_of(name: str, *, special: bool = True) -> ByteTokens:
    return ByteTokens(SPECIAL[name] if special else ())


@pytest.mark.parametrize(("name", "special"), list(product(SPECIAL, [True, False])))
def test_an_answer_that_must_call_is_valid_calls(name: str, special: bool) -> None:
    use = ToolUse(tools=TOOLS, choice="required")
    tokens = tokens_of(name, special=special)
    grammar = named(name).grammar(use, "", special_tokens=tokens.special_tokens)
    assert grammar is not None
    for seed in SEEDS:
        text = walked(name, tokens, grammar, seed)
        parts = parsed(name, text, use=use, special_tokens=tokens.special_tokens)
        calls = calls_in(parts)
        assert calls
        if name != "harmony":  # it may write a preamble
            assert not any(isinstance(part, Content) for part in parts), text
        for tool, arguments in calls:
            jsonschema_rs.validate(SCHEMAS[tool], arguments)


def test_every_format_with_tools_is_walked() -> None:
    assert set(SPECIAL) == {name for name in FORMATS if FORMATS[name].takes_tools}


@pytest.mark.parametrize("name", SPECIAL)
def test_a_named_tool_is_the_only_one(name: str) -> None:
    use = ToolUse(tools=TOOLS, named="time", parallel=False)
    tokens = tokens_of(name)
    grammar = named(name).grammar(use, "", special_tokens=tokens.special_tokens)
    assert grammar is not None
    for seed in SEEDS:
        text = walked(name, tokens, grammar, seed)
        (call,) = calls_in(parsed(name, text, use=use, special_tokens=tokens.special_tokens))
        assert call[0] == "time"


@pytest.mark.parametrize("name", SPECIAL)
def test_a_strict_tool_binds_the_calls_of_a_free_answer(name: str) -> None:
    use = ToolUse(tools=(*TOOLS[:2], ToolSpec(name="rich", parameters=RICH, strict=True)))
    tokens = tokens_of(name)
    grammar = named(name).grammar(use, "", special_tokens=tokens.special_tokens)
    assert grammar is not None
    for seed in SEEDS:
        text = walked(name, tokens, grammar, seed, BEGINNINGS.get(name, "[TOOL_CALLS]"))
        calls = calls_in(parsed(name, text, use=use, special_tokens=tokens.special_tokens))
        assert calls
        for tool, arguments in calls:
            jsonschema_rs.validate(SCHEMAS[tool], arguments)


@pytest.mark.parametrize("name", SPECIAL)
def test_a_free_answer_may_be_text(name: str) -> None:
    use = ToolUse(tools=(ToolSpec(name="f", strict=True),))
    tokens = tokens_of(name)
    grammar = named(name).grammar(use, "", special_tokens=tokens.special_tokens)
    assert grammar is not None
    text = "<|channel|>final<|message|>" if name == "harmony" else ""
    assert tokens.accepts(grammar, f"{text}It is {{12}}: [1].")


@pytest.mark.parametrize("name", SPECIAL)
def test_without_a_must_there_is_no_grammar(name: str) -> None:
    assert named(name).grammar(USE, "") is None
    assert named(name).grammar(ToolUse(tools=TOOLS, choice="none"), "") is None
    assert named(name).grammar(ToolUse(choice="required"), "") is None


CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("prompt", "text", "accepted"),
    [
        ("", CALL, True),
        ("", f"<think>\nhm\n</think>\n\n{CALL}", True),
        ("", f"hm {CALL}", False),
        ("<think>\n", f"hm</think>{CALL}\n{CALL}", True),
        ("<think>\n", CALL, False),
        ("<think>\n\n</think>\n\n", CALL, True),
        ("<think>\n\n</think>\n\n", f"<think></think>{CALL}", False),
    ],
)
def test_reasoning_comes_before_calls(prompt: str, text: str, accepted: bool) -> None:
    grammar = named("qwen3").grammar(REQUIRED, prompt)
    assert grammar is not None
    assert ByteTokens().accepts(grammar, text) == accepted


SCHEMA = Grammar(kind="json_schema", text='{"type": "object", "properties": {"a": {"const": 1}}}')
REGEX = Grammar(kind="regex", text=r"a/b\/\d+\n[/]")
LARK = Grammar(kind="lark", text='start: word+\nword: "x}" | "y" // }')


@pytest.mark.parametrize(
    ("grammar", "text"), [(SCHEMA, '{"a": 1}'), (REGEX, "a/b/12\n/"), (LARK, "x}yx}")]
)
def test_a_response_is_bound_after_its_reasoning(grammar: Grammar, text: str) -> None:
    tokens = ByteTokens()
    bound = named("qwen3").response_grammar(grammar, "<think>\n")
    assert tokens.accepts(bound, f"any {{text</think>\n\n{text}")
    assert not tokens.accepts(bound, text)
    assert not tokens.accepts(bound, "</think>z", whole=False)
    optional = named("qwen3").response_grammar(grammar, "")
    assert tokens.accepts(optional, text)
    assert tokens.accepts(optional, f"<think>hm</think>{text}")


@pytest.mark.parametrize("name", SPECIAL)
def test_a_free_answer_is_calls_or_a_response(name: str) -> None:
    use, tokens = ToolUse(tools=(WEATHER, TIME)), tokens_of(name)
    special = tokens.special_tokens
    grammar = named(name).grammar(use, "", response=SCHEMA, special_tokens=special)
    assert grammar is not None
    kinds = set()
    for seed in range(24):
        parts = parsed(name, walked(name, tokens, grammar, seed), use=use, special_tokens=special)
        calls, texts = calls_in(parts), [part.text for part in parts if isinstance(part, Content)]
        for tool, arguments in calls:
            jsonschema_rs.validate(SCHEMAS[tool], arguments)
        if name != "harmony" and not calls:  # harmony may write a preamble
            jsonschema_rs.validate(json.loads(SCHEMA.text), json.loads("".join(texts)))
        kinds.add(bool(calls))
    assert kinds == {True, False}


@pytest.mark.parametrize("response", [SCHEMA, None])
def test_an_answer_that_must_call_is_no_response(response: Grammar | None) -> None:
    bound = named("hermes").grammar(REQUIRED, "", response=response)
    assert bound == named("hermes").grammar(REQUIRED, "")


def test_an_answer_without_tools_needs_no_grammar_of_calls() -> None:
    assert named("hermes").grammar(NO_TOOLS, "", response=SCHEMA) is None
    assert named("harmony").grammar(NO_TOOLS, "", response=SCHEMA) is None


def test_a_response_without_reasoning_keeps_its_grammar() -> None:
    assert named("hermes").response_grammar(SCHEMA, "") is SCHEMA
    assert named("plain").response_grammar(SCHEMA, "<think>") is SCHEMA
    assert named("qwen3").response_grammar(SCHEMA, "</think>\n\n") is SCHEMA


def test_a_response_in_channels_is_the_final_message() -> None:
    tokens = tokens_of("harmony")
    bound = named("harmony").response_grammar(REGEX, "", special_tokens=tokens.special_tokens)
    start = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    assert tokens.accepts(bound, f"{start}<|channel|>final<|message|>a/b/1\n/")
    assert tokens.accepts(bound, "<|channel|>final<|message|>a/b/1\n/")
    assert not tokens.accepts(bound, "<|channel|>final<|message|>hm", whole=False)


def test_an_answer_may_go_on_inside_a_message() -> None:
    tokens = tokens_of("harmony")
    prompt = "<|start|>assistant<|channel|>analysis<|message|>I th"
    grammar = named("harmony").grammar(REQUIRED, prompt, special_tokens=tokens.special_tokens)
    assert grammar is not None
    call = "<|channel|>commentary to=functions.time <|constrain|>json<|message|>{}"
    assert tokens.accepts(grammar, f"ink<|end|><|start|>assistant{call}")
    assert not tokens.accepts(grammar, call)


@pytest.mark.parametrize("name", ["qwen3_coder", "gemma4"])
def test_a_strict_tool_with_a_pattern_is_refused(name: str) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "string", "pattern": "a+"}}}
    tool = ToolSpec(name="f", parameters=schema, strict=True)
    with pytest.raises(UnboundSchema, match="'pattern'"):
        named(name).grammar(ToolUse(tools=(tool,), choice="required"), "")
    loose = ToolUse(tools=(ToolSpec(name="f", parameters=schema),), choice="required")
    grammar = named(name).grammar(loose, "")
    assert grammar is not None
    ByteTokens().matcher(grammar)


@pytest.mark.parametrize(
    ("form", "name"),
    [("pythonic", "a b"), ("glm", "a</arg_key>"), ("qwen3_coder", "a\nb"), ("glm", "")],
)
def test_an_argument_whose_name_the_form_cannot_write_is_refused(form: str, name: str) -> None:
    tool = ToolSpec(name="f", parameters={"type": "object", "properties": {name: {}}})
    with pytest.raises(UnboundSchema, match="a name that"):
        named(form).grammar(ToolUse(tools=(tool,), choice="required"), "")


def test_a_name_is_quoted_in_a_grammar() -> None:
    use = ToolUse(tools=(ToolSpec(name='a"b\\'),), choice="required")
    grammar = named("hermes").grammar(use, "")
    assert grammar is not None
    text = '<tool_call>\n{"name": "a\\"b\\\\", "arguments": {}}\n</tool_call>'
    assert ByteTokens().accepts(grammar, text)
    assert calls_in(parsed("hermes", text, use=use)) == [('a"b\\', {})]
