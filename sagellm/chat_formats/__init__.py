"""How models write tool calls and reasoning, and the table of the formats, by name.

To ship a format, add a file with its `ChatFormat`, and an entry to the table below. `chat_format`
has the contract.
"""

from sagellm.chat_formats.block_format import PLAIN, THINKING
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
    open_plain_parser,
    random_id,
)
from sagellm.chat_formats.harmony import HARMONY
from sagellm.chat_formats.hermes import HERMES, QWEN3
from sagellm.chat_formats.llama3 import LLAMA3
from sagellm.chat_formats.mistral import MAGISTRAL, MAGISTRAL_2506, MISTRAL, MISTRAL_LIST

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
    "format_of",
    "open_plain_parser",
    "random_id",
]

# The first format whose `matches` is true counts. PLAIN matches every template.
FORMATS: tuple[ChatFormat, ...] = (
    *(HARMONY, QWEN3, HERMES, LLAMA3),
    *(MAGISTRAL, MAGISTRAL_2506, MISTRAL, MISTRAL_LIST),
    *(THINKING, PLAIN),
)


def format_of(template: str | None) -> ChatFormat:
    """Return the format of a model from its chat template (None: the model has none)."""
    return next(one for one in FORMATS if one.matches(template or ""))
