"""Formats are found from chat templates; users register their own."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sagellm
from sagellm.chat_formats import FORMATS, format_of

TOOLS = (Path(__file__).parents[3] / "docs" / "tools.md").read_text()
HERMES = """\
{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}{%- for tool in tools %}
{{- tool | tojson }}{%- endfor %}{{- '</tools>\\nFor each call, return a JSON object within
<tool_call></tool_call>:\\n<tool_call>\\n{\\"name\\": <name>, \\"arguments\\": <args>}\\n' }}
{%- endif %}"""
QWEN3 = HERMES + "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}"
CODER = "{{- '<tool_call>\\n<function=' + name + '>\\n<parameter=' + key + '>\\n' }}" + HERMES
LLAMA = """\
{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and
its value}. Do not use variables.' }}{{- "<|python_tag|>" + tool_call.name }}"""
TOOL_LOOP = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
V3 = f"""{TOOL_LOOP}{{{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + 'function<｜tool▁sep｜>' +
name + '\\n```json\\n' + arguments + '\\n```<｜tool▁call▁end｜>' }}}}"""
V3_1 = f"""{TOOL_LOOP}{{{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' +
arguments + '<｜tool▁call▁end｜>' }}}}{{{{ '<｜Assistant｜></think>' }}}}"""
KIMI = """{{ tools | tojson }}<|tool_calls_section_begin|><|tool_call_begin|>{{ tool_call['id'] }}
<|tool_call_argument_begin|>{{ arguments }}<|tool_call_end|><|tool_calls_section_end|>"""
TEMPLATES = {
    "deepseek_v3": V3,
    "deepseek_r1": f"{V3}{{{{ content.split('</think>')[-1] }}}}",
    "deepseek_v3_1": V3_1,
    "kimi_k2": KIMI,
    "kimi_k2_thinking": f"{KIMI}<think></think>",
    "hermes": HERMES,
    "qwen3": QWEN3,
    "qwen3_coder": CODER,
    "qwen3_5": f"{CODER}{{{{- '<think>\\n\\n</think>' }}}}",
    "llama3": LLAMA,
    "glm": "<tool_call>{{ name }}\n<arg_key>{{ key }}</arg_key> </think>",
    "pythonic": "{{- 'Use exact format: [func_name1(param1=value1), func_name2(...)]' }}",
    "mistral_list": "{{- '[TOOL_CALLS][' }}{{- tool_call.function | tojson }}",
    "mistral": "{{- '[TOOL_CALLS]' + name + '[CALL_ID]' + id + '[ARGS]' + arguments }}",
    "magistral": "{{- '[THINK]' + text + '[/THINK]' }}{{- '[TOOL_CALLS]' + name + '[ARGS]' }}",
    "magistral_2506": "{{- '<think>\\n...\\n</think>' }}{{- '[TOOL_CALLS]' + name + '[ARGS]' }}",
    "gemma4": "{{- '<|tool_call>call:' + name + '{' }}{{- '}<tool_call|>' }}",
    "function_gemma": "{{- '<start_function_call>call:' + name + '{' }}{{- '<escape>' }}",
    "harmony": "{{- '<|start|>assistant<|channel|>final<|message|>' + content + '<|end|>' }}",
    "thinking": "{% set content = content.split('</think>')[-1] %}{{- '<Assistant><think>\\n' }}",
    "plain": "{{ '<start_of_turn>' + role + '\\n' + content | trim + '<end_of_turn>\\n' }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_has_a_format(name: str) -> None:
    assert format_of(TEMPLATES[name]).name == name


def test_every_format_has_a_template() -> None:
    assert TEMPLATES.keys() == dict(FORMATS).keys()


def test_the_document_lists_all_formats() -> None:
    table = TOOLS.split("## Formats")[1].split("**How")[0]
    names = {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line[:40])}
    assert names == set(FORMATS)


def test_a_model_without_a_template_is_plain() -> None:
    form = format_of(None)
    assert form.name == "plain"
    assert not form.takes_tools
    assert not form.has_reasoning
    assert not form.keeps_special_tokens


def test_tags_of_other_calls_are_not_taken_for_json() -> None:
    form = format_of("<tool_call>{{name}}\n<arg_key>{{key}}</arg_key>")
    assert form.name == "plain"
    assert not form.takes_tools
    other = "<tool_call>{{ name }}<tool_sep><arg_key>{{ key }}</arg_key> </think>"
    assert format_of(other).name == "thinking"


def test_calls_in_a_template_that_shows_no_tools_are_not_taken() -> None:
    assert format_of(V3.replace(TOOL_LOOP, "")).name == "plain"
    assert format_of(V3_1.replace(TOOL_LOOP, "")).name == "thinking"


@pytest.fixture
def unregistered() -> Iterator[None]:
    yield
    FORMATS._registered.clear()


@pytest.mark.usefixtures("unregistered")
def test_a_registered_format_comes_first() -> None:
    sagellm.register_chat_format("own", FORMATS["hermes"])
    assert format_of(HERMES) is FORMATS["own"]
    assert format_of(LLAMA).name == "llama3"


@pytest.mark.usefixtures("unregistered")
def test_what_is_no_format_is_refused() -> None:
    with pytest.raises(TypeError, match="'own' has no name"):
        sagellm.register_chat_format("own", object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ships with sagellm"):
        sagellm.register_chat_format("hermes", FORMATS["hermes"])
