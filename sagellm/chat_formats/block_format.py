"""Formats in which a marker opens a block of tool calls: one class for all of them."""

from collections.abc import Callable
from dataclasses import dataclass

from sagellm.chat_formats.answer_parts import AnswerParser
from sagellm.chat_formats.call_blocks import CallBlock, CallBlockReader
from sagellm.chat_formats.chat_format import DrawId, SpecialTokens, ToolUse, random_id
from sagellm.chat_formats.lark_text import response_rules, start_rules
from sagellm.chat_formats.markers import DroppedMarkers, MarkerFinder
from sagellm.chat_formats.part_writer import ContentReader, PartWriter, ReadingParser, TextReader
from sagellm.chat_formats.reasoning import ReasoningReader, ReasoningTags
from sagellm.runtime.sampling import Grammar


def draw_call_id(draw_id: DrawId) -> str:
    """The id of a call as in the OpenAI API."""
    return f"call_{draw_id(24)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """A format whose calls stand in blocks. Implements ChatFormat.

    `signs`: texts that all templates of the format contain; none contains one of `countersigns`.
    `openings`: the markers of blocks. `inner`: further markers that may be special tokens.
    `open_block` opens the reader of a block with a given opening. `call_rules` returns the rules of
    a grammar, of which `calls` is the text of all calls. A format without it takes no tools.
    """

    name: str
    signs: tuple[str, ...]
    countersigns: tuple[str, ...] = ()
    tags: ReasoningTags | None = None
    openings: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    open_block: Callable[[PartWriter, str], CallBlock] | None = None
    call_rules: Callable[[ToolUse, SpecialTokens], str] | None = None
    call_id: Callable[[DrawId], str] = draw_call_id

    @property
    def takes_tools(self) -> bool:
        return self.call_rules is not None

    @property
    def has_reasoning(self) -> bool:
        return self.tags is not None

    @property
    def keeps_special_tokens(self) -> bool:
        return True  # many tokenizers have the markers as special tokens

    def matches(self, template: str) -> bool:
        return all(sign in template for sign in self.signs) and not any(
            sign in template for sign in self.countersigns
        )

    def open_parser(
        self,
        use: ToolUse,
        prompt: str,
        *,
        special_tokens: SpecialTokens = {},
        draw_id: DrawId = random_id,
    ) -> AnswerParser:
        writer = PartWriter(use, lambda: self.call_id(draw_id))
        reader = self._open_calls(use, writer)
        if self.tags is not None:
            is_open = self.tags.is_open(prompt)
            reader = ReasoningReader(self.tags, is_open=is_open, writer=writer, then=reader)
        markers = {*self.openings, *self.inner}
        if self.tags is not None:
            markers |= {self.tags.opening, self.tags.closing}
        dropped = MarkerFinder(special_tokens.keys() - markers)
        return ReadingParser(writer, DroppedMarkers(dropped, reader))

    def _open_calls(self, use: ToolUse, writer: PartWriter) -> TextReader:
        open_block = self.open_block
        if open_block is None or not use.allowed:
            return ContentReader(writer)
        return CallBlockReader(self.openings, lambda opening: open_block(writer, opening), writer)

    def grammar(
        self, use: ToolUse, prompt: str, *, special_tokens: SpecialTokens = {}
    ) -> Grammar | None:
        if self.call_rules is None or not use.must_call or not use.allowed:
            return None
        start = start_rules("calls", self.tags, prompt, special_tokens)
        return Grammar(kind="lark", text=f"{start}\n{self.call_rules(use, special_tokens)}\n")

    def response_grammar(
        self, grammar: Grammar, prompt: str, *, special_tokens: SpecialTokens = {}
    ) -> Grammar:
        if self.tags is None or self.tags.is_closed(prompt):
            return grammar
        start = start_rules("response", self.tags, prompt, special_tokens)
        return Grammar(kind="lark", text=f"{start}\n{response_rules(grammar)}\n")
