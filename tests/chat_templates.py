"""Chat templates of families of models, as short as they can be, over the byte tokenizer."""

from typing import Any

from sagellm.gateway.protocol.sampling_params import ModelCard
from sagellm.runtime.models.chat import DEFAULT_RENDERING, ChatTemplate, Rendering
from sagellm.runtime.models.tokenizer import ByteTokenizer, Messages

_MESSAGES = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
HERMES = """
{%- if tools %}Tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}
{% endif %}
{%- for message in messages %}
{{- message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
{%- endfor %}

{% endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""
QWEN3 = f"""{HERMES}
{{%- if enable_thinking is defined and not enable_thinking %}}<think>

</think>
{{% endif %}}"""
LLAMA3 = """{# {"name": function name, "parameters": #}""" + _MESSAGES
GEMMA4 = "{# <|tool_call> #}" + _MESSAGES
MISTRAL = "{# [TOOL_CALLS] [ARGS] #}" + _MESSAGES
HARMONY = "{# <|channel|> <|message|> #}" + _MESSAGES
KIMI = """{# <|tool_calls_section_begin|> #}
{%- for message in messages %}{{ message.role }}: {{ message.content or "" }}
{%- for call in message.tool_calls or [] %}<|tool_call_begin|>{{ call.id }}
{%- endfor %}
{% endfor %}"""
PLAIN = _MESSAGES


CARD = ModelCard(
    names=("m",), root="m", max_model_len=4096, vocab_size=256, created=7, takes_grammars=True
)


class TemplateTokenizer(ByteTokenizer):
    """The byte tokenizer with a chat template."""

    def __init__(self, template: str) -> None:
        self.chat_template = template
        self._template = ChatTemplate(template, {})
        self.chat_variables = self._template.variables

    def apply_chat_template(self, messages: Messages, how: Rendering = DEFAULT_RENDERING) -> str:
        return self._template.render(messages, how)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """A tool whose arguments are integers of these names."""
    schema = {"type": "object", "properties": {key: {"type": "integer"} for key in properties}}
    return {"type": "function", "function": {"name": name, "parameters": schema}}
