"""Grammars in Lark: what is checked and changed before llguidance compiles one."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field

from llguidance.gbnf_to_lark import gbnf_to_lark

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.json_schemas import schema_text
from sagellm.runtime.grammars.regex_cost import check_regex_cost, regex_cost

MAX_LARK_CHARS = 64 << 10  # without the schemas in it
MAX_GBNF_CHARS = 16 << 10  # the conversion takes time quadratic in it
_BLANKS = re.compile(r"\s*")
_GBNF_RULE = re.compile(r"(?m)^[ \t]*[\w-]+[ \t]*::=")
_STRING = r'"(?:\\.|[^"\\\n])*"'
_ATTRIBUTES = rf'\s*\[(?:{_STRING}|[^\]"]){{0,300}}\]'
_TOKEN = re.compile(
    rf"""
      (?P<comment>(?://|\#)[^\n]*)
    | (?P<string>{_STRING}i?)
    | /(?P<regex>(?:\\.|[^/\\])+)/[imslux]*
    | %(?P<block>json|regex)\b
    | (?P<special><[^<>\s]+>)
    | (?P<head>[A-Za-z_][\w-]*)(?:{_ATTRIBUTES})?(?:\.-?\d+|::\w+)?[ \t]*:(?!:)
    | (?P<name>[A-Za-z_][\w-]*)(?P<bracket>\s*\[)?
    | [^A-Za-z_"/%<\#]+
    | (?P<stray>["/])                           # scanning on from each would take quadratic time
    | .
    """,
    re.VERBOSE | re.DOTALL,
)
# Attributes of rules that are not taken: drafts are not taken back across the first three, and the
# temperature is that of the request.
_ATTRIBUTE = re.compile(r"[\[,]\s*(stop|stop_capture|max_tokens|temperature)\s*=")


@dataclass(slots=True)
class _Definition:
    """A rule or a terminal. `names`: how often the body has each name. `size`: characters of it.
    `regexes`: the cost of its regular expressions.
    """

    size: int = 0
    regexes: int = 0
    names: "Counter[str]" = field(default_factory=Counter)


def lark_text(text: str) -> str:
    """The Lark text that llguidance compiles for a grammar in Lark. Raises GrammarError if the
    grammar is too expensive, or has what is not taken.
    """
    pieces, definitions = _scan(text)
    if sum(each.size for each in definitions.values()) > MAX_LARK_CHARS:
        raise GrammarError(f"the grammar is longer than {MAX_LARK_CHARS >> 10} KiB")
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
    current, position = _Definition(), 0
    definitions = {"": current}
    while found := _TOKEN.match(text, position):
        position = found.end()
        piece = found[0]
        if head := found["head"]:
            _check_attributes(piece)
            current = definitions.setdefault(head, _Definition())
        elif block := found["block"]:
            piece, position = _block(text, block, position)
        elif name := found["name"]:
            if found["bracket"] and _begins_line(pieces):
                raise GrammarError("the attributes of a rule are not valid")
            current.names[name] += 1
        elif regex := found["regex"]:
            current.regexes += regex_cost(regex)
        elif found["stray"]:
            raise GrammarError("the grammar has a string or a regular expression without an end")
        if not found["block"] and not found["comment"]:
            current.size += len(piece)
        pieces.append(piece)
    return pieces, definitions


def _begins_line(pieces: list[str]) -> bool:
    return not pieces or pieces[-1].rstrip(" \t").endswith("\n")


def _check_attributes(head: str) -> None:
    if attribute := _ATTRIBUTE.search(head):
        raise GrammarError(f"the attribute {attribute[1]} of rules is not supported")


def _block(text: str, kind: str, position: int) -> tuple[str, int]:
    """What is given to llguidance for the JSON after %json or %regex, and where that JSON ends."""
    begin = _BLANKS.match(text, position).end()  # type: ignore[union-attr]  # it always matches
    try:
        found, end = json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError):
        raise GrammarError(f"what follows %{kind} is not valid JSON") from None
    if not isinstance(found, dict):
        raise GrammarError(f"what follows %{kind} is not a JSON object")
    return f"%{kind} {schema_text(found) if kind == 'json' else text[begin:end]}", end


def _cost(definitions: dict[str, _Definition]) -> int:
    """The cost of all regular expressions, and of terminals, which become regular expressions."""
    sizes: dict[str, int] = {}
    for name in definitions:
        _measure(name, definitions, sizes)
    terminals = sum(sizes[name] ** 2 for name in definitions if _is_terminal(name))
    return terminals + sum(
        each.regexes for name, each in definitions.items() if not _is_terminal(name)
    )


def _measure(name: str, definitions: dict[str, _Definition], sizes: dict[str, int]) -> None:
    """Set the size of a terminal with the terminals that it names. Circles are refused later."""
    waiting = [name]
    while waiting:
        current = waiting[-1]
        sizes.setdefault(current, 0)  # until it is known: in a circle, it stays so
        inner = [one for one in definitions[current].names if _is_terminal(one)]
        unknown = [one for one in inner if one in definitions and one not in sizes]
        if unknown:
            waiting += unknown
            continue
        counts = definitions[current].names
        sizes[current] = definitions[current].size + sum(
            counts[one] * sizes.get(one, 0) for one in inner
        )
        waiting.pop()


def _is_terminal(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()
