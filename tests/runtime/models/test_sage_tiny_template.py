"""The chat template of sage-tiny: tools, calls and results, as transformers renders them."""

import pytest
import train_sage_tiny
from transformers import AutoTokenizer

from sagellm.runtime.models.chat import ChatTemplate, ChatTemplateError, Rendering
from sagellm.runtime.models.folder import resolve_model
from sagellm.runtime.models.tokenizer import load_tokenizer

FOLDER = resolve_model("sage-tiny")
TINY = load_tokenizer(FOLDER)
BEFORE_TOOLS = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is the weather in Paris?"}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": '{"weather": "sunny"}'}
CALL_TEXT = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOLS_TEXT = "# Tools\nget_weather(city: string, unit?: string)"


def tool(name="get_weather", **parameters):
    function = {"name": name, "description": "the weather of a city", "parameters": parameters}
    return {"type": "function", "function": function}


WEATHER = tool(
    type="object",
    properties={"city": {"type": "string"}, "unit": {"type": "string"}},
    required=["city"],
)


def call(arguments, name="get_weather"):
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls, content=None):
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def rendered(*messages, tools=(), **options):
    return TINY.apply_chat_template(messages, Rendering(tools=tools, **options))


def test_tools_follow_the_system_message_a_line_each():
    text = rendered(SYSTEM, USER, tools=(WEATHER, tool("now")))
    system = f"<|system|>Be brief.\n{TOOLS_TEXT}\nnow()<|end|>"
    assert text == f"{system}<|user|>{USER['content']}<|end|><|assistant|>"


def test_tools_have_a_system_turn_of_their_own():
    text = rendered(USER, tools=(WEATHER,), add_generation_prompt=False)
    assert text == f"<|system|>{TOOLS_TEXT}<|end|><|user|>{USER['content']}<|end|>"


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
def test_a_call_and_its_result(content, arguments):
    text = rendered(USER, calling(call(arguments), content=content), RESULT)
    assert text == (
        f"<|user|>{USER['content']}<|end|><|assistant|>{CALL_TEXT}<|end|>"
        '<|tool|>{"weather": "sunny"}<|end|><|assistant|>'
    )


def test_calls_follow_the_content_a_line_each():
    message = calling(call({"city": "Paris"}), call({}, "now"), content="I look.")
    text = rendered(message, add_generation_prompt=False)
    second = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert text == f"<|assistant|>I look.\n{CALL_TEXT}\n{second}<|end|>"


@pytest.mark.parametrize(
    ("parameters", "shown"),
    [
        ({}, "f()"),
        ({"type": "object"}, "f()"),
        ({"properties": {"a": {"type": "integer"}}}, "f(a?: integer)"),
        ({"properties": {"a": {"type": ["string", "null"]}}}, "f(a?: string|null)"),
        ({"properties": {"a": True}}, "f(a?)"),
        ({"properties": {"a": {"anyOf": []}}, "required": ["a"]}, "f(a)"),
        ({"properties": {"items": {"type": "array"}}, "required": ["items"]}, "f(items: array)"),
    ],
)
def test_arguments_have_their_types(parameters, shown):
    assert f"# Tools\n{shown}<|end|>" in rendered(USER, tools=(tool("f", **parameters),))


def test_a_tool_without_parameters():
    assert "\nnow()<" in rendered(USER, tools=({"function": {"name": "now"}},))


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_without_tools_prompts_are_those_of_before(add_generation_prompt):
    conversation = [SYSTEM, USER, {"role": "assistant", "content": "Sunny."}, USER, SYSTEM]
    how = Rendering(add_generation_prompt=add_generation_prompt)
    right = ChatTemplate(BEFORE_TOOLS, {}).render(conversation, how)
    assert TINY.apply_chat_template(conversation, how) == right


def test_a_message_without_content_is_refused():
    with pytest.raises(ChatTemplateError, match="content"):
        rendered({"role": "user"})


@pytest.mark.parametrize("messages", [(SYSTEM, USER), (USER,)])
@pytest.mark.parametrize("tools", [(), (WEATHER, tool("now"))])
def test_transformers_renders_and_encodes_the_same(messages, tools):
    conversation = [*messages, calling(call({"city": "K\u00f6ln"})), RESULT]
    theirs = AutoTokenizer.from_pretrained(FOLDER.path)
    options = {"tools": list(tools) or None, "add_generation_prompt": True}
    right = theirs.apply_chat_template(conversation, tokenize=False, **options)
    assert rendered(*conversation, tools=tools) == right
    assert "K\u00f6ln" in right
    ids = theirs(right, add_special_tokens=False).input_ids
    assert list(TINY.encode(right, add_special_tokens=False)) == ids
    assert train_sage_tiny.render(conversation, tools, add_generation_prompt=True) == right
    assert train_sage_tiny.encode(right) == ids


def test_a_call_is_kept_where_special_tokens_are_skipped():
    token_ids = TINY.encode(f"<|tool|>{CALL_TEXT}<|end|>", add_special_tokens=False)
    assert [token_ids[0], token_ids[1], token_ids[-2]] == [263, 261, 262]
    assert TINY.decode(token_ids) == CALL_TEXT
    assert TINY.token_bytes(261) == b"<tool_call>"


def test_the_template_is_that_of_the_training():
    assert TINY.chat_template == train_sage_tiny.CHAT_TEMPLATE
    assert TINY.isolated_template is None
    assert TINY.isolated_encoder is None
    shipped = FOLDER.file("tokenizer.json").read_text()
    assert shipped == train_sage_tiny.tokenizer().to_str(pretty=True)
