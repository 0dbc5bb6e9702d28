"""Chat templates with tools, variables and messages to continue, as transformers renders them."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from sagellm.runtime.models.chat import ChatTemplate, ChatTemplateError, Rendering

# In the manner of Qwen3: tools, calls with arguments as objects, reasoning, variables.
CHATML = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>
{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
{%- for name, value in call.function.arguments.items() %}[{{ name }}={{ value }}]{% endfor %}
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>
{% endif %}{% endif %}"""
TRIMMED = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}</s>{% endfor %}"
NONE_MEANS_CALLS = """
{%- for m in messages %}
{%- if m['role'] == 'assistant' and m['content'] is none %}calls:{{ m.tool_calls | length }};
{%- else %}{{ m['role'] }}:{{ m['content'] }};
{%- endif %}{% endfor %}"""

ARGUMENTS = {"city": "K\u00f6ln", "days": 3}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "Is it raining?"}
HISTORY = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "look"},
    {"role": "tool", "content": "no", "tool_call_id": "c1"},
]


def theirs(template, messages, tools=None, **options):
    return render_jinja_template([messages], tools=tools, chat_template=template, **options)[0][0]


def ours(template, messages, **options):
    return ChatTemplate(template, {}).render(messages, Rendering(**options))


@pytest.mark.parametrize("tools", [(), (TOOL,)])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_calls_tools_and_variables(tools, variables):
    right = theirs(CHATML, HISTORY, list(tools) or None, add_generation_prompt=True, **variables)
    assert ours(CHATML, HISTORY, tools=tools, variables=variables) == right
    assert "[city=K\u00f6ln]" in right


@pytest.mark.parametrize("template", [CHATML, TRIMMED])
@pytest.mark.parametrize("final", ["It is", "It is ", "  It is\n", "user", "a</s>b"])
@pytest.mark.parametrize("role", ["assistant", "user"])
def test_the_final_message_goes_on(template, final, role):
    messages = [USER, {"role": role, "content": final}]
    right = theirs(template, messages, continue_final_message=True)
    options = {"continue_final_message": True, "add_generation_prompt": False}
    assert ours(template, messages, **options) == right
    assert right.rstrip().endswith(final.strip())


def test_a_message_that_is_not_shown_cannot_go_on():
    with pytest.raises(ChatTemplateError, match="does not show the end"):
        ours(
            "{{ messages[0].content }}",
            [USER, USER | {"content": "x"}],
            continue_final_message=True,
        )


def test_without_a_generation_prompt():
    right = theirs(CHATML, [USER], add_generation_prompt=False)
    assert ours(CHATML, [USER], add_generation_prompt=False) == right


def test_no_content_is_an_empty_text():
    """Most templates add it to others, or would write "None"."""
    none = [{**message, "content": message["content"] or None} for message in HISTORY]
    assert ours(CHATML, none) == ours(CHATML, HISTORY)


def test_no_content_is_none_where_the_template_asks_for_it():
    none = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    right = theirs(NONE_MEANS_CALLS, none)
    assert ours(NONE_MEANS_CALLS, none) == right == "user:Is it raining?;calls:1;"


def test_the_variables_of_a_template_are_those_it_reads():
    text = (
        "{{ bos_token }}{% set a = 1 %}{{ a }}{{ mode }}{{ messages }}{{ range(depth) }}{{ tools }}"
    )
    assert ChatTemplate(text, {"bos_token": "<s>"}).variables == {"mode", "depth"}
    assert ChatTemplate("{% for %}", {}).variables == frozenset()


def test_rendering_changes_no_message():
    messages = [USER]
    ours(CHATML, messages, continue_final_message=True)
    assert messages == [{"role": "user", "content": "Is it raining?"}]
