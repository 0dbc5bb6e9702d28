"""How models write tool calls and reasoning, and the table of the formats, by name.

To ship a format, add a file with its `ChatFormat`, and an entry to the table below. `answer_parts`
has the parts of an answer, `chat_format` the contract.
"""

from sagellm.chat_formats.answer_parts import (
    AnswerParser,
    AnswerPart,
    Content,
    OpenParser,
    PlainParser,
    Reasoning,
    ToolCallDelta,
    open_plain_parser,
)
from sagellm.chat_formats.chat_format import (
    NO_TOOLS,
    ChatFormat,
    DrawId,
    SpecialTokens,
    ToolSpec,
    ToolUse,
    random_id,
)
from sagellm.chat_formats.hermes import HERMES, QWEN3
from sagellm.chat_formats.plain import PLAIN, THINKING

__all__ = [
    "FORMATS",
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
FORMATS: tuple[ChatFormat, ...] = (QWEN3, HERMES, THINKING, PLAIN)


def format_of(template: str | None) -> ChatFormat:
    """Return the format of a model from its chat template (None: the model has none)."""
    return next(one for one in FORMATS if one.matches(template or ""))
