"""Grammars that bytes describe. Each is refused with a reason, or compiled and followed by a random
model, all of it within limits.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from grammar_walks import RandomModel, json_compiler, json_tokenizer, read_json, validator_of

from sagellm.backends.step import MatcherError
from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.grammar_compiler import check_grammar
from sagellm.runtime.sampling import Grammar

MAX_CPU_S = 3.0  # several times what any grammar has taken to be checked, compiled and followed
NUM_TOKENS = 40
_MAX_DEPTH = 6
_ATOMS = ("a", "b", "[a-z]", r"\d", r"\p{L}", ".", "é", "(?s:.)", "[^a]", "x{3}", "^", "$")
_QUANTIFIERS = ("", "", "", "*", "+", "?", "{1,50}", "{0,9}", "{1000}", "{2,}", "+?")
_BODIES = ("a", "b", "A", "B", '"x"', '""', "/y*/", "/(.|\\n)*/", "<|call|>", "<[5-9]>", "%json {}",
           '%json {"type":"array"}', '%regex {"substring_chars":"abc"}', "start")  # fmt: skip
_REPEATS = ("", "", "", "*", "+", "?", "{2,99}", "~3", "{0,1000}")
_HEADS = ("a: ", "b: ", "A: ", "B: ", "b[lazy]: ", 'a[suffix="x"]: ', "%ignore ", "root ::= ")
_PIECES = (
    *_ATOMS, *_QUANTIFIERS, *_BODIES, *_HEADS, "\n", "(", ")", "|", "[", "]", '"', "/", "\\", "::_",
    "%if", "@", "->", "&", "//", "{",
)  # fmt: skip
_NUMBERS = (0, 1, 2, 3, 10, 100, 10**5, -1, 0.5, 1e300, 10**30)


class _Feed:
    """The bytes of one input; zeros follow them."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)
        self.is_empty = False

    def below(self, limit: int) -> int:
        value = next(self._data, None)
        self.is_empty |= value is None
        return (value or 0) % limit

    def pick(self, values: "tuple[Any, ...]") -> Any:
        return values[self.below(len(values))]


def grammar_of(data: bytes) -> Grammar:
    """The grammar that bytes describe: a schema of known keywords, or pieces of a syntax."""
    feed = _Feed(data)
    match feed.below(8):
        case 0:
            return Grammar(kind="regex", text=_rows(feed, _ATOMS, _QUANTIFIERS, 4))
        case 1:
            return Grammar(kind="lark", text=_lark(feed))
        case 2:
            text = "".join(feed.pick(_PIECES) for _ in range(40) if not feed.is_empty)
            return Grammar(kind=feed.pick(("regex", "lark")), text=text)
        case 3:
            raw = data[1:].decode(errors="replace")
            return Grammar(kind=feed.pick(("json_schema", "regex", "lark")), text=raw)
    schema = _schema(feed, _MAX_DEPTH)
    schema["$defs"] = {"a": _schema(feed, 3), "b": _schema(feed, 3)}
    return Grammar(kind="json_schema", text=json.dumps(schema))


def _rows(feed: _Feed, atoms: tuple[str, ...], repeats: tuple[str, ...], depth: int) -> str:
    """Alternatives of atoms and groups in a row, each perhaps repeated."""
    parts = []
    for _ in range(1 + feed.below(4)):
        group = depth > 0 and feed.below(3) == 0
        atom = f"({_rows(feed, atoms, repeats, depth - 1)})" if group else feed.pick(atoms)
        parts.append(f"{atom}{feed.pick(repeats)}{feed.pick((' ', ' ', ' | '))}")
    joined = "".join(parts).strip(" |")
    return joined if atoms is _BODIES else joined.replace(" ", "")


def _lark(feed: _Feed) -> str:
    heads = ["start: ", *_HEADS[:4], *(feed.pick(_HEADS) for _ in range(feed.below(2)))]
    return "\n".join(f"{head}{_rows(feed, _BODIES, _REPEATS, 2)}" for head in heads)


def _schema(feed: _Feed, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": feed.pick(_TYPES)} if feed.below(4) else {}
    for _ in range(feed.below(5)):
        keyword = feed.pick(tuple(_KEYWORDS))
        if depth and not feed.is_empty:
            found[keyword] = _KEYWORDS[keyword](feed, depth - 1)
    return found


def _value(feed: _Feed, depth: int) -> Any:
    values = (None, True, "x", "größer", 1, 1.5, -7, [1], {"a": 1}, "", [], 'q"\\')
    return feed.pick(values)


def _list(item: Callable[[_Feed, int], Any]) -> Callable[[_Feed, int], Any]:
    return lambda feed, depth: [item(feed, depth) for _ in range(feed.below(4))]


def _map(feed: _Feed, depth: int) -> Any:
    names = ("a", "b", "^c", "ü", 'q"', "")
    return {feed.pick(names): _schema(feed, depth) for _ in range(feed.below(4))}


_TYPES = ("string", "integer", "number", "object", "array", "boolean", "null")
_KEYWORDS: dict[str, Callable[[_Feed, int], Any]] = {
    "type": lambda feed, depth: feed.pick((*_TYPES, ["string", "null"], "foo")),
    "enum": _list(_value),
    "const": _value,
    "pattern": lambda feed, depth: _rows(feed, _ATOMS, _QUANTIFIERS, 2),
    "format": lambda feed, depth: feed.pick(("date", "date-time", "email", "ipv6", "uri", "zebra")),
    "$ref": lambda feed, depth: feed.pick(("#", "#/$defs/a", "#/$defs/b", "#/x", "http://x/")),
    "required": _list(lambda feed, depth: feed.pick(("a", "b", "z", 1))),
    **dict.fromkeys(("properties", "patternProperties"), _map),
    **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), _list(_schema)),
    **dict.fromkeys(("items", "additionalProperties", "not"), _schema),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems", "minimum", "maximum", "multipleOf",
         "exclusiveMinimum", "exclusiveMaximum", "minProperties", "maxProperties"),
        lambda feed, depth: feed.pick(_NUMBERS),
    ),
}  # fmt: skip


def take(data: bytes) -> None:
    """Check, compile and follow a grammar."""
    grammar = grammar_of(data)
    begin_s = time.thread_time()
    reason = ""
    try:
        check_grammar(grammar)
        _follow(grammar, int.from_bytes(data[:4], "little"))
    except (GrammarError, MatcherError) as error:
        reason = str(error)
    taken_s = time.thread_time() - begin_s
    assert len(reason) < 300
    assert taken_s < MAX_CPU_S, f"{taken_s:.1f} s of CPU time"


def _follow(grammar: Grammar, seed: int) -> None:
    model = RandomModel(json_tokenizer(), np.random.default_rng(seed), patience=10)
    matcher = json_compiler().compile(grammar, "", ignores_eos=False)
    output, is_finished = model.answer(matcher, NUM_TOKENS)
    if is_finished and grammar.kind == "json_schema":
        _check(json.loads(grammar.text), json_tokenizer().decode(output))


def _check(schema: Any, text: str) -> None:
    """Raise an error if the text is not valid by the schema, if another implementation reads it."""
    try:
        validator = validator_of(schema)
    except ValueError:
        return
    validator.validate(read_json(text))
