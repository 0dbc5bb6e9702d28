"""Formats in which a marker opens a block of tool calls, as data; and those without tools."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from sagellm.chat_formats.answer_readers import (
    THINK,
    ReadBlock,
    ReadingParser,
    ReasoningTags,
    read_blocks,
    read_content,
    read_reasoning,
)
from sagellm.chat_formats.chat_format import (
    NO_SPECIAL_TOKENS,
    AnswerParser,
    DrawId,
    SpecialTokens,
    ToolUse,
    random_id,
)
from sagellm.chat_formats.lark_rules import (
    ANY_TEXT,
    literal,
    marker,
    response_rules,
    start_rules,
    text_up_to,
)
from sagellm.chat_formats.part_writer import PartWriter
from sagellm.chat_formats.text_source import MarkerFinder, TextReading, TextSource
from sagellm.runtime.sampling import Grammar


def draw_call_id(draw_id: DrawId) -> str:
    """The id of a call as in the OpenAI API."""
    return f"call_{draw_id(24)}"


BlockRules: TypeAlias = Callable[[ToolUse, SpecialTokens], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """A format whose calls stand in blocks. Implements ChatFormat.

    `signs`: texts that all templates of the format contain; none contains a text of `countersigns`.
    `opening`: the marker of a block; "" if a block is the whole answer. `other_openings`: read like
    it, and never asked for. `first`: see `read_blocks`. `inner`: further markers, which may be
    special tokens. `between`: the text between two blocks; None if one block has all calls.

    `block_rules` returns the rules of a grammar; the rule `block` is the text of a block after its
    opening. A format without `read_block` takes no tools.
    """

    name: str
    signs: tuple[str, ...]
    countersigns: tuple[str, ...] = ()
    tags: ReasoningTags | None = None
    opening: str = ""
    other_openings: tuple[str, ...] = ()
    first: str = ""
    inner: tuple[str, ...] = ()
    between: str | None = None
    read_block: ReadBlock | None = None
    block_rules: BlockRules = lambda use, special_tokens: ""
    call_id: Callable[[DrawId], str] = draw_call_id

    @property
    def takes_tools(self) -> bool:
        return self.read_block is not None

    @property
    def has_reasoning(self) -> bool:
        return self.tags is not None

    @property
    def keeps_special_tokens(self) -> bool:
        """True for all formats with markers: many tokenizers have them as special tokens."""
        return self.takes_tools or self.has_reasoning

    @property
    def _openings(self) -> tuple[str, ...]:
        return (*filter(None, [self.opening]), *self.other_openings)

    @property
    def _markers(self) -> set[str]:
        """The texts of special tokens that the readers must see."""
        tags = (self.tags.opening, self.tags.closing) if self.tags is not None else ()
        return {*self._openings, *self.inner, *tags}

    def matches(self, template: str) -> bool:
        return all(sign in template for sign in self.signs) and not any(
            sign in template for sign in self.countersigns
        )

    def open_parser(
        self,
        use: ToolUse,
        prompt: str,
        *,
        special_tokens: SpecialTokens = NO_SPECIAL_TOKENS,
        draw_id: DrawId = random_id,
    ) -> AnswerParser:
        is_open = self.tags is not None and self.tags.is_open(prompt)

        def read(source: TextSource, writer: PartWriter) -> TextReading[None]:
            return self._read(source, writer, is_open=is_open, has_calls=bool(use.allowed))

        writer = PartWriter(use, lambda: self.call_id(draw_id))
        return ReadingParser(read, writer, special_tokens.keys() - self._markers)

    def _read(
        self, source: TextSource, writer: PartWriter, *, is_open: bool, has_calls: bool
    ) -> TextReading[None]:
        space = ""
        if self.tags is not None:
            space = yield from read_reasoning(source, writer, self.tags, is_open=is_open)
        if self.read_block is None or not has_calls:
            yield from read_content(source, writer, space)
            return
        openings = MarkerFinder(self._openings)
        yield from read_blocks(
            source, writer, self.read_block, openings, first=self.first, space=space
        )

    def grammar(
        self,
        use: ToolUse,
        prompt: str,
        *,
        response: Grammar | None = None,
        special_tokens: SpecialTokens = NO_SPECIAL_TOKENS,
    ) -> Grammar | None:
        if not self.takes_tools or not use.needs_grammar(response):
            return None
        start = start_rules("answer", self.tags, prompt, special_tokens)
        if use.must_call:
            answer = f"answer: {self._blocks(use, special_tokens)}"
        elif response is not None:
            blocks = self._blocks(use, special_tokens)
            answer = f"answer: calls | response\ncalls: {blocks}\n{response_rules(response)}"
        else:
            answer = self._free(use, special_tokens)
        rules = self.block_rules(use, special_tokens)
        return Grammar(kind="lark", text=f"{start}\n{answer}\n{rules}\n")

    def _blocks(self, use: ToolUse, special_tokens: SpecialTokens) -> str:
        """An answer that is one or more blocks."""
        one = f"{marker(self.opening, special_tokens)} block".lstrip()
        if self.between is None or not use.parallel:
            return one
        return f"{one} ({literal(self.between)} {one})*"

    def _free(self, use: ToolUse, special_tokens: SpecialTokens) -> str:
        """The rule `answer` of any text in which what follows an opening is a block."""
        many = "*" if use.parallel else "?"
        if not self.opening:
            return f"answer: block | /\\s*([^{re.escape(self.first)}\\s](?s:.*))?/"
        head = text_up_to("head", self.opening, special_tokens)
        return f"answer: (head block){many} {ANY_TEXT}\n{head}"

    def response_grammar(
        self, grammar: Grammar, prompt: str, *, special_tokens: SpecialTokens = NO_SPECIAL_TOKENS
    ) -> Grammar:
        if self.tags is None or self.tags.is_closed(prompt):
            return grammar
        start = start_rules("response", self.tags, prompt, special_tokens)
        return Grammar(kind="lark", text=f"{start}\n{response_rules(grammar)}\n")


PLAIN = BlockFormat(name="plain", signs=())
# DeepSeek-R1 and its distilled models, and others that reason and do not know tools.
THINKING = BlockFormat(name="thinking", signs=(THINK.closing,), tags=THINK)
