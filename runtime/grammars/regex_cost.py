"""What a regular expression may cost to compile, estimated from its text alone.

llguidance takes time and memory that grow with the square of the number of optional parts in a row:
2,000 parts like `.?` take 0.3 s, and 20,000 take gigabytes. Other parts cost little.
"""

import re

from sagellm.runtime.grammars import GrammarError

MAX_IN_A_ROW = 1000
MAX_COST = MAX_IN_A_ROW**2
# Every repetition is bounded, or cannot fail late: the text may be hostile to this expression, too.
_PART = re.compile(
    r"""
      \\(?:[pPxuU]\{[^}]{0,100}\}|.)                             # an escape
    | \[\^?\]?(?>\\.|\[:[a-z^]{0,12}:\]|[^\\\]])*+\]              # a class
    | (?P<open>\((?:\?(?:P?<[^<>]{0,100}>|[a-zA-Z-]{0,10}:?))?)  # a group, with a name or flags
    | (?P<next>\|)
    | (?P<close>\))
    | (?P<plain>[^\\\[()|]+)
    | (?P<stray>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_OPTIONAL = re.compile(r"[?*]|\{\s*0*\s*,")


def num_optional(text: str) -> int:
    """The quantifiers in a text that allow nothing: `?`, `*`, and `{0,3}`."""
    return sum(1 for _ in _OPTIONAL.finditer(text))


def regex_cost(regex: str) -> int:
    """The sum of the squares of the numbers of optional parts, over all alternatives. The number of
    a group is that of its worst alternative. Raises GrammarError if a class has no end.
    """
    cost, current, worst = 0, 0, 0
    outer: list[tuple[int, int]] = []
    for found in _PART.finditer(regex):
        if found["open"]:
            outer.append((current, worst))
            current, worst = 0, 0
        elif found["next"] or (found["close"] and outer):
            cost += current**2
            current, worst = 0, max(worst, current)
            if found["close"]:
                before, worst_before = outer.pop()
                current, worst = before + worst, worst_before
        elif found["plain"]:
            current += num_optional(found[0])
        elif found["stray"]:
            raise GrammarError("a regular expression is not valid")
    return cost + sum((before + current) ** 2 for before, _ in outer) + current**2


def check_regex_cost(cost: int) -> None:
    """Raise GrammarError if regular expressions of this cost in all are too expensive."""
    if cost > MAX_COST:
        cause = f"regular expressions with more than {MAX_IN_A_ROW} optional parts in a row"
        raise GrammarError(f"the grammar has {cause}, or many with nearly as many")
