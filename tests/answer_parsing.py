"""Answers of chat formats in tests: parsed in pieces, and generated at random from grammars."""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from types import SimpleNamespace
from typing import Any

import msgspec
from llguidance import LLMatcher, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

from sagellm.chat_formats import (
    FORMATS,
    NO_SPECIAL_TOKENS,
    AnswerPart,
    ChatFormat,
    SpecialTokens,
    ToolCallDelta,
    ToolSpec,
    ToolUse,
)
from sagellm.runtime.sampling import Grammar

WEATHER = ToolSpec(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
TIME = ToolSpec(name="time")
USE = ToolUse(tools=(WEATHER, TIME))
REQUIRED = ToolUse(tools=(WEATHER, TIME), choice="required")


def named(name: str) -> ChatFormat:
    return FORMATS[name]


def parsed(
    name: str,
    text: str | Iterable[str],
    *,
    use: ToolUse = USE,
    prompt: str = "",
    special_tokens: SpecialTokens = NO_SPECIAL_TOKENS,
) -> list[AnswerPart]:
    """The joined parts of an answer. `text`: the whole, or its pieces. Ids are numbers."""
    numbers = count()
    parser = FORMATS[name].open_parser(
        use, prompt, special_tokens=special_tokens, draw_id=lambda length: str(next(numbers))
    )
    pieces = [text] if isinstance(text, str) else text
    parts = [part for piece in pieces for part in parser.push(piece)]
    return joined([*parts, *parser.finish()])


def _key(part: AnswerPart) -> tuple[type[AnswerPart], int]:
    return type(part), part.index if isinstance(part, ToolCallDelta) else 0


def joined(parts: Iterable[AnswerPart]) -> list[AnswerPart]:
    """Adjacent parts of one kind as one part."""
    return [_join(list(group)) for _, group in groupby(parts, _key)]


def _join(group: Sequence[AnswerPart]) -> AnswerPart:
    first = group[0]
    if not isinstance(first, ToolCallDelta):
        return type(first)("".join(part.text for part in group))
    assert first.id
    assert not any(part.id or part.name for part in group[1:])
    return msgspec.structs.replace(first, arguments="".join(part.arguments for part in group))


def call(index: int, name: str, arguments: str, prefix: str = "call_") -> ToolCallDelta:
    """A whole call, with the id that `parsed` gives it."""
    return ToolCallDelta(index, f"{prefix}{index}", name, arguments)


def calls_in(parts: Iterable[AnswerPart]) -> list[tuple[str, Any]]:
    """(name, decoded arguments) of all calls. Fractions may be too large for a float, so all
    are 0.5.
    """
    return [
        (part.name, json.loads(part.arguments, parse_float=lambda text: 0.5))
        for part in parts
        if isinstance(part, ToolCallDelta)
    ]


EOS = 256


class ByteTokens:
    """A tokenizer of 256 bytes, the end token, and special tokens."""

    def __init__(self, special_tokens: Iterable[str] = ()) -> None:
        self.special_tokens: Mapping[str, int] = {
            text: EOS + number for number, text in enumerate(special_tokens, start=1)
        }
        self.texts = {number: text for text, number in self.special_tokens.items()}
        marked = [b"\xff" + text.encode() for text in ("<eos>", *self.special_tokens)]
        tokens = [bytes([value]) for value in range(256)] + marked
        given = SimpleNamespace(
            eos_token_id=EOS,
            bos_token_id=None,
            tokens=tokens,
            special_token_ids=list(range(EOS, len(tokens))),
        )
        wrapper = TokenizerWrapper(_Callable(given))
        self.tokenizer = LLTokenizer(wrapper, n_vocab=len(tokens))

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A matcher of a grammar; the grammar must be valid."""
        text = {
            "lark": LLMatcher.grammar_from_lark,
            "json_schema": LLMatcher.grammar_from_json_schema,
            "regex": LLMatcher.grammar_from_regex,
        }[grammar.kind](grammar.text)
        assert LLMatcher.validate_grammar(text, self.tokenizer) == ""
        matcher = LLMatcher(self.tokenizer, text, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def ids(self, text: str) -> list[int]:
        """The tokens of a text in which special tokens are written as they are."""
        for special, number in self.special_tokens.items():
            if special in text:
                before, _, after = text.partition(special)
                return [*self.ids(before), number, *self.ids(after)]
        return list(text.encode())

    def accepts(self, grammar: Grammar, text: str, *, whole: bool = True) -> bool:
        """Whether a text belongs to a grammar, or (not `whole`) begins one that does."""
        matcher, ids = self.matcher(grammar), self.ids(text)
        is_beginning = matcher.try_consume_tokens(ids) == len(ids)
        return is_beginning and (matcher.is_accepting() or not whole)


class _Callable:
    def __init__(self, given: SimpleNamespace) -> None:
        self.__dict__.update(given.__dict__)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@dataclass
class Walk:
    """A random walk through a grammar, which likes to close what is open.

    `begin`: the beginning of the text. `hints`: texts that the walk tries as a whole now
    and then, because it would never find them.
    """

    tokens: ByteTokens
    grammar: Grammar
    seed: int
    hints: tuple[str, ...]
    begin: str = ""

    def text(self) -> str:
        """A whole text of the grammar."""
        random_ = random.Random(self.seed)
        matcher = self.tokens.matcher(self.grammar)
        ids = self.tokens.ids(self.begin)
        assert matcher.consume_tokens(ids)
        while not matcher.is_stopped():
            if matcher.is_accepting() and random_.random() < 0.3:
                break
            chosen = self._next(matcher, random_, is_late=len(ids) > 300)
            assert matcher.consume_tokens(chosen), matcher.get_error()
            ids += chosen
            assert len(ids) < 3000, "".join(self._shown(ids))
        return "".join(self._shown(ids))

    def _next(self, matcher: LLMatcher, random_: random.Random, *, is_late: bool) -> list[int]:
        if random_.random() < (0.3 if is_late else 0.1):
            for hint in random_.sample(self.hints, len(self.hints)):
                ids = self.tokens.ids(hint)
                if matcher.deep_copy().try_consume_tokens(ids) == len(ids):
                    return ids
        mask = matcher.compute_logit_bias()
        allowed = [number for number, bias in enumerate(mask) if bias and number != EOS]
        plain = [number for number in allowed if number < 128 and chr(number).isprintable()]
        closing = [number for number in plain if chr(number) in '"}]'] if is_late else []
        likely = [number for number in allowed if number > EOS or chr(number) in '"}],'] * 10
        return [random_.choice(closing or [*(plain or allowed), *likely])]

    def _shown(self, ids: list[int]) -> Iterator[str]:
        run = bytearray()
        for number in ids:
            if number < EOS:
                run.append(number)
                continue
            yield run.decode()
            run.clear()
            yield self.tokens.texts[number]
        yield run.decode()
