"""What a regular expression may cost to compile, estimated from its text alone.

llguidance takes time and memory that grow with the square of the number of parts in a row, if many
of them may be empty: 4,000 parts like `.?` take half a second. Alternatives do not multiply.
"""

import re

from sagellm.runtime.grammars import GrammarError

MAX_IN_A_ROW = 2048
MAX_COST = MAX_IN_A_ROW**2
_PART = re.compile(
    r"""
      \\(?:[pPxuU]\{[^}]*\}|.)                # an escape
    | \[\^?\]?(?:\\.|\[:[^\]]*:\]|[^\\\]])*\] # a class
    | [()|]
    | [^\\\[()|]+
    """,
    re.VERBOSE | re.DOTALL,
)


def regex_cost(regex: str) -> int:
    """The sum of the squares of the lengths of all alternatives. The length of a group is that of
    its longest alternative.
    """
    cost, current, longest = 0, 0, 0
    outer: list[tuple[int, int]] = []
    for found in _PART.finditer(regex):
        part = found[0]
        if part == "(":
            outer.append((current, longest))
            current, longest = 0, 0
        elif part == "|" or (part == ")" and outer):
            cost += current**2
            current, longest = 0, max(longest, current)
            if part == ")":
                before, longest_before = outer.pop()
                current, longest = before + longest + 2, longest_before
        else:
            current += len(part)
    return cost + sum((before + current) ** 2 for before, _ in outer) + current**2


def check_regex_cost(cost: int) -> None:
    """Raise GrammarError if regular expressions of this cost in all are too expensive."""
    if cost > MAX_COST:
        cause = f"regular expressions of more than {MAX_IN_A_ROW} characters in a row"
        raise GrammarError(f"the grammar has {cause}, or many nearly as long ones")
