"""The ways in which models write tool calls and reasoning, and the table of the formats, by name.

`chat_format` has the contract. To ship a format, add a file with its `ChatFormat`, and an entry to
the table below. Users register their own formats with `sagellm.register_chat_format`; packages
offer formats as entry points `sagellm.chat_formats`.
"""

from typing import Any

from sagellm.chat_formats.block_format import PLAIN, THINKING
from sagellm.chat_formats.call_sections import (
    DEEPSEEK_R1,
    DEEPSEEK_V3,
    DEEPSEEK_V3_1,
    KIMI_K2,
    KIMI_K2_THINKING,
)
from sagellm.chat_formats.chat_format import (
    NO_SPECIAL_TOKENS,
    NO_TOOLS,
    AnswerParser,
    AnswerPart,
    ChatFormat,
    Content,
    DrawId,
    OpenParser,
    PlainParser,
    Reasoning,
    SpecialTokens,
    ToolCallDelta,
    ToolSpec,
    ToolUse,
    UnboundSchema,
    open_plain_parser,
    random_id,
)
from sagellm.chat_formats.gemma import FUNCTION_GEMMA, GEMMA4
from sagellm.chat_formats.glm import GLM
from sagellm.chat_formats.harmony import HARMONY
from sagellm.chat_formats.hermes import HERMES, QWEN3
from sagellm.chat_formats.llama3 import LLAMA3
from sagellm.chat_formats.mistral import MAGISTRAL, MAGISTRAL_2506, MISTRAL, MISTRAL_LIST
from sagellm.chat_formats.pythonic import PYTHONIC
from sagellm.chat_formats.qwen_coder import QWEN3_5, QWEN3_CODER
from sagellm.runtime.registry import Registry

__all__ = [
    "FORMATS",
    "NO_SPECIAL_TOKENS",
    "NO_TOOLS",
    "AnswerParser",
    "AnswerPart",
    "ChatFormat",
    "Content",
    "DrawId",
    "OpenParser",
    "PlainParser",
    "Reasoning",
    "SpecialTokens",
    "ToolCallDelta",
    "ToolSpec",
    "ToolUse",
    "UnboundSchema",
    "format_of",
    "open_plain_parser",
    "random_id",
]

_SHIPPED = (
    *(DEEPSEEK_R1, DEEPSEEK_V3_1, DEEPSEEK_V3, KIMI_K2_THINKING, KIMI_K2, GLM),
    *(HARMONY, GEMMA4, FUNCTION_GEMMA, QWEN3_5, QWEN3_CODER, QWEN3, HERMES, PYTHONIC, LLAMA3),
    *(MAGISTRAL, MAGISTRAL_2506, MISTRAL, MISTRAL_LIST, THINKING, PLAIN),
)


_PARTS = (
    *("name", "takes_tools", "has_reasoning", "keeps_special_tokens", "matches", "open_parser"),
    *("grammar", "response_grammar"),
)


def read_chat_format(name: str, given: Any) -> ChatFormat:
    """Return the chat format. Raises TypeError for a value that is none."""
    missing = [part for part in _PARTS if not hasattr(given, part)]
    if missing:
        raise TypeError(f"chat format {name!r} has no {missing[0]}; see ChatFormat")
    format_: ChatFormat = given
    return format_


FORMATS: Registry[ChatFormat] = Registry(
    "chat format", "sagellm.chat_formats", {one.name: one for one in _SHIPPED}, read_chat_format
)


def format_of(template: str | None) -> ChatFormat:
    """Return the format of a model from its chat template (None: the model has none).

    The first format that matches counts: formats of users, then those above in their order. PLAIN
    matches every template. Raises BrokenEntryPoint.
    """
    names = [*(name for name in FORMATS if name not in FORMATS.ours), *FORMATS.ours]
    found = (FORMATS[name] for name in names)
    return next(one for one in found if one.matches(template or ""))
