"""The contract of chat formats: the parts of an answer, their parser, and the calls of tools."""

import secrets
import string
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from sagellm.runtime.sampling import Grammar


class Content(msgspec.Struct, frozen=True, tag="content", gc=False):
    """Text of the answer for the user."""

    text: str


class Reasoning(msgspec.Struct, frozen=True, tag="reasoning", gc=False):
    """Text of the model's reasoning before its answer."""

    text: str


class ToolCallDelta(msgspec.Struct, frozen=True, tag="tool_call", gc=False):
    """A piece of one tool call.

    `index`: the number of the call in its answer, from 0. `id` and `name` are set in the first
    piece of a call and empty in later pieces. The `arguments` of all pieces of a call, joined, are
    the JSON text of an object, unless the answer was cut off or the model wrote broken JSON.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


AnswerPart: TypeAlias = Content | Reasoning | ToolCallDelta


class AnswerParser(Protocol):
    """Splits the text of one choice into parts. It never fails: text without a known form is
    content.
    """

    def push(self, text: str) -> list[AnswerPart]:
        """Return the parts that the next piece of the text completes. May hold text back."""
        ...

    def finish(self) -> list[AnswerPart]:
        """Return the parts of the text that was held back. No text may follow."""
        ...


OpenParser: TypeAlias = Callable[[], AnswerParser]


class PlainParser:
    """The parser of a model without tools and reasoning: all text is content."""

    def push(self, text: str) -> list[AnswerPart]:
        return [Content(text)] if text else []

    def finish(self) -> list[AnswerPart]:
        return []


def open_plain_parser() -> AnswerParser:
    return PlainParser()


class ToolSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that the model may call.

    `parameters`: a JSON schema of the arguments; None allows any object. `strict`: the arguments
    satisfy the schema even if the model need not call a tool.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False


class ToolUse(msgspec.Struct, frozen=True, kw_only=True):
    """The tools of a request, and whether the model may or must call them.

    `named`: the model must call this tool, whatever `choice` says. `parallel`: whether an answer
    may have several calls.
    """

    tools: tuple[ToolSpec, ...] = ()
    choice: Literal["none", "auto", "required"] = "auto"
    named: str = ""
    parallel: bool = True

    @property
    def allowed(self) -> tuple[ToolSpec, ...]:
        """The tools that the answer may call."""
        if self.named:
            return tuple(tool for tool in self.tools if tool.name == self.named)
        return () if self.choice == "none" else self.tools

    @property
    def must_call(self) -> bool:
        return bool(self.named) or self.choice == "required"

    @property
    def is_bound(self) -> bool:
        """Whether a grammar must bind the calls."""
        return bool(self.allowed) and (self.must_call or any(tool.strict for tool in self.allowed))

    def needs_grammar(self, response: Grammar | None) -> bool:
        """Whether a grammar must bind the answer. `response`: that of an answer without calls."""
        return self.is_bound or (bool(self.allowed) and response is not None)


NO_TOOLS = ToolUse()

SpecialTokens: TypeAlias = Mapping[str, int]  # text -> id of the special tokens of a tokenizer
NO_SPECIAL_TOKENS: SpecialTokens = MappingProxyType({})
DrawId: TypeAlias = Callable[[int], str]  # returns a text of so many letters and digits

_ID_CHARACTERS = string.ascii_letters + string.digits


def random_id(length: int) -> str:
    """A random text of letters and digits."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(length))


class UnboundSchema(ValueError):
    """A strict tool has a schema that the grammar of a format cannot express."""


class ChatFormat(Protocol):
    """The way in which the models of a family write tool calls and reasoning.

    `takes_tools`: whether the template shows tools to the model, and the format knows its calls.
    `has_reasoning`: whether the model may write reasoning before its answer. A parser of a format
    that `keeps_special_tokens` must get a text with special tokens (`skip_special_tokens=False`).
    It drops the special tokens that are not part of the format.

    `prompt`: the rendered prompt. Its end says where the answer begins, for example inside the
    reasoning. `special_tokens`: those of the model's tokenizer.
    """

    @property
    def name(self) -> str: ...
    @property
    def takes_tools(self) -> bool: ...
    @property
    def has_reasoning(self) -> bool: ...
    @property
    def keeps_special_tokens(self) -> bool: ...

    def matches(self, template: str) -> bool:
        """Return whether a chat template (its Jinja text) is written for this format."""
        ...

    def open_parser(
        self,
        use: ToolUse,
        prompt: str,
        *,
        special_tokens: SpecialTokens = NO_SPECIAL_TOKENS,
        draw_id: DrawId = random_id,
    ) -> AnswerParser:
        """Open the parser of one choice. `draw_id` makes the ids of its calls."""
        ...

    def grammar(
        self,
        use: ToolUse,
        prompt: str,
        *,
        response: Grammar | None = None,
        special_tokens: SpecialTokens = NO_SPECIAL_TOKENS,
    ) -> Grammar | None:
        """Return the grammar of answers that call tools as `use` says, or None if any text may be
        an answer. Raises UnboundSchema.

        `response`: the grammar of an answer that calls no tool; None: any text. It has no effect if
        a tool must be called.
        """
        ...

    def response_grammar(
        self, grammar: Grammar, prompt: str, *, special_tokens: SpecialTokens = NO_SPECIAL_TOKENS
    ) -> Grammar:
        """Return the grammar of answers with free reasoning and, after it, a text of `grammar`."""
        ...
