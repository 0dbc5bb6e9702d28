"""Grammars in Lark: what is checked and changed before llguidance compiles one."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field

from llguidance.gbnf_to_lark import gbnf_to_lark

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.compile_cost import check_regex_cost, num_optional, regex_cost
from sagellm.runtime.grammars.json_schemas import own_options, schema_text
from sagellm.runtime.grammars.references import Definition, longest_chain, num_levels

MAX_LARK_CHARS = 64 << 10  # without the schemas in it
# Rules and groups in each other. Each takes about 3 KB of the stack of llguidance, and a thread has
# 2 MB under `ulimit -s unlimited`. A level of a schema takes more.
MAX_LEVELS = 500
_LEVELS_OF_SCHEMA = 1.6
MAX_GBNF_CHARS = 16 << 10  # the conversion takes time quadratic in it
_BLANKS = re.compile(r"\s*")
_GBNF_RULE = re.compile(r"(?m)^[ \t]*[\w-]+[ \t]*::=")
_STRING = r'"(?:\\.|[^"\\\n])*"'
_ATTRIBUTES = rf'(?:{_STRING}|[^\]"]){{0,200}}\]'
_LINE = r"(?:\A|\n)[ \t]*[?!]*"
_TOKEN = re.compile(
    rf"""
      (?P<comment>(?://|\#)[^\n]*)
    | (?P<string>{_STRING}i?)
    | /(?P<regex>(?:\\.|[^/\\])+)/[imslux]*
    | (?P<json>%json\b)
    | (?P<regex_block>%regex\b)
    | (?P<special><[^<>\s]+>)
    | {_LINE}(?P<head>[A-Za-z_][\w-]*)(?:\s*\[{_ATTRIBUTES})?(?:\.-?\d+|::\w+)?[ \t]*:(?!:)
    | (?P<unclear>{_LINE}[A-Za-z_][\w-]*\s*\[)(?!{_ATTRIBUTES})
    | (?P<name>[A-Za-z_][\w-]*)
    | (?:[ \t]*\n)+(?=[ \t]*\n)
    | (?P<sign>[^A-Za-z_"/%<\#\n]+)
    | (?P<stray>["/])                    # it is refused: scanning on from each takes quadratic time
    | .
    """,
    re.VERBOSE | re.DOTALL,
)
# Attributes of rules that are not taken: drafts are not taken back across the first three, and the
# temperature is that of the request.
_ATTRIBUTE = re.compile(r"[\[,]\s*(stop|stop_capture|max_tokens|temperature)\s*=")


@dataclass(slots=True)
class _Definition:
    """A rule or a terminal. `num_optional`: its optional parts, also those in its regular
    expressions. `regexes`: the cost of these. `names`: how often the body has each name. `depths`:
    the deepest level that has each name. `num_levels`: how deeply the body is nested.
    """

    num_optional: int = 0
    regexes: int = 0
    names: "Counter[str]" = field(default_factory=Counter)
    depths: dict[str, int] = field(default_factory=dict)
    num_levels: int = 1
    _level: int = 1

    def add_name(self, name: str) -> None:
        self.names[name] += 1
        self.depths[name] = max(self._level, self.depths.get(name, 0))

    def add_sign(self, text: str) -> None:
        self.num_optional += num_optional(text) + text.count("[") + text.count("~")
        for sign in text:
            if sign in "([":
                self._level += 1
                self.add_levels(0)
            elif sign in ")]":
                self._level = max(1, self._level - 1)

    def add_levels(self, number: int) -> None:
        """Count the levels of what stands here."""
        self.num_levels = max(self.num_levels, self._level + number)


def lark_text(text: str) -> str:
    """The Lark text that llguidance compiles for a grammar in Lark. Raises GrammarError if the
    grammar is too expensive, or has what is not taken.
    """
    pieces, definitions = _scan(text)
    if _num_levels(definitions) > MAX_LEVELS:
        raise GrammarError(f"rules and groups lead to each other through {MAX_LEVELS} levels")
    check_regex_cost(_cost(definitions))
    return "".join(pieces)


def special_tokens(text: str) -> set[str]:
    """The names of special tokens in a grammar, without their angle brackets."""
    found = (match["special"] for match in _TOKEN.finditer(text))
    return {name[1:-1] for name in found if name}


def has_gbnf_rules(text: str) -> bool:
    """Whether a grammar has rules of GBNF, as llama.cpp reads it, or EBNF: `name ::= ...`."""
    return _GBNF_RULE.search(text) is not None


def from_gbnf(text: str) -> str:
    """The grammar in Lark. Its start is the rule `root`. Raises GrammarError."""
    if len(text) > MAX_GBNF_CHARS:
        raise GrammarError(f"a grammar of ::= rules is longer than {MAX_GBNF_CHARS >> 10} KiB")
    try:
        return gbnf_to_lark(text)
    except Exception:  # it raises bare Exception, and its text quotes the grammar
        raise GrammarError("the grammar of ::= rules is not valid") from None


def _scan(text: str) -> tuple[list[str], dict[str, _Definition]]:
    """The pieces of the text, with schemas as they are compiled, and its definitions."""
    pieces: list[str] = []
    current, position, size = _Definition(), 0, 0
    definitions = {"": current}
    while found := _TOKEN.match(text, position):
        position = found.end()
        piece = found[0]
        match kind := found.lastgroup:
            case "head":
                _check_attributes(piece)
                current = definitions.setdefault(found["head"], _Definition())
            case "json" | "regex_block":
                piece, position, levels = _block(text, kind, position)
                current.add_levels(int(levels * _LEVELS_OF_SCHEMA))
            case "name":
                current.add_name(piece)
            case "regex":
                current.num_optional += num_optional(piece)
                current.regexes += regex_cost(found["regex"])
            case "sign":
                current.add_sign(piece)
            case "string":
                current.num_optional += len(piece) == len('""')
            case "stray":
                raise GrammarError("a string or a regular expression has no end")
            case "unclear":
                raise GrammarError("the attributes of a rule are not valid")
        if kind not in ("json", "comment"):
            size += len(found[0])
        if size > MAX_LARK_CHARS:
            raise GrammarError(f"the grammar is longer than {MAX_LARK_CHARS >> 10} KiB")
        pieces.append(piece)
    return pieces, definitions


def _check_attributes(head: str) -> None:
    if attribute := _ATTRIBUTE.search(head):
        raise GrammarError(f"the attribute {attribute[1]} of rules is not supported")


def _block(text: str, kind: str, position: int) -> tuple[str, int, int]:
    """Return the text for llguidance of %json or %regex with its JSON, where the JSON ends, and how
    many levels it has.
    """
    begin = _BLANKS.match(text, position).end()  # type: ignore[union-attr]  # it always matches
    try:
        found, end = json.JSONDecoder().raw_decode(text, begin)
    except RecursionError:
        raise GrammarError("the schema is nested too deeply") from None
    except ValueError:
        raise GrammarError("what follows %json or %regex is not valid JSON") from None
    if not isinstance(found, dict):
        raise GrammarError("what follows %json or %regex is not a JSON object")
    if kind == "json":
        levels = num_levels(found)
        return f"%json {schema_text(found, own_options(found))}", end, levels
    return f"%regex {text[begin:end]}", end, 0


def _num_levels(definitions: dict[str, _Definition]) -> int:
    """The most levels that llguidance goes through from a definition into others."""
    known = {name: Definition(one.num_levels, one.depths) for name, one in definitions.items()}
    known[""] = Definition(0, dict.fromkeys(definitions, 0))
    return longest_chain(known, "")


def _cost(definitions: dict[str, _Definition]) -> int:
    """The cost of the regular expressions in rules, and of terminals, which become such."""
    totals: dict[str, int] = {}
    for name in definitions:
        _add_up(name, definitions, totals)
    return sum(
        totals[name] ** 2 if _is_terminal(name) else each.regexes
        for name, each in definitions.items()
    )


def _add_up(name: str, definitions: dict[str, _Definition], totals: dict[str, int]) -> None:
    """Set the number of optional parts of a terminal with the terminals that it names. llguidance
    refuses circles.
    """
    waiting = [name]
    while waiting:
        current = waiting[-1]
        totals.setdefault(current, 0)  # until it is known: in a circle, it stays so
        inner = {
            one: number
            for one, number in definitions[current].names.items()
            if one in definitions and _is_terminal(one)
        }
        if unknown := [one for one in inner if one not in totals]:
            waiting += unknown
            continue
        totals[current] = definitions[current].num_optional + sum(
            number * totals[one] for one, number in inner.items()
        )
        waiting.pop()


def _is_terminal(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()
