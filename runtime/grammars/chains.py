"""How deeply definitions lead to each other: references of a schema, rules of a grammar.

llguidance calls itself for each level. A chain of 900 references overflows a stack of 8 MB, which
ends the process.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Definition(NamedTuple):
    """`num_levels`: how deeply its text is nested. `names`: the definitions that it names, each
    with the deepest level that names it.
    """

    num_levels: int
    names: Mapping[str, int]


def longest_chain(definitions: Mapping[str, Definition], start: str) -> int:
    """The most levels on a way from `start` that enters each definition once, or a larger number.

    Definitions that lead to each other in circles count as if one way entered all of them, because
    to find the longest such way takes exponential time. Names without a definition are left out.
    """
    longest: dict[str, int] = {}
    for component in _components(definitions, start):
        inside, around = 0, 0
        for name in component:
            num_levels, names = definitions[name]
            around = max(around, num_levels)
            depths = [0]
            for other, depth in names.items():
                if other in component:
                    depths.append(depth)
                elif other in longest:
                    around = max(around, depth + longest[other])
            inside += max(depths)
        longest |= dict.fromkeys(component, inside + around)
    return longest[start]


def _components(definitions: Mapping[str, Definition], start: str) -> Iterator[set[str]]:
    """The strongly connected components that `start` reaches, after those that they lead to.

    Tarjan, Depth-first search and linear graph algorithms, 1972, without recursion.
    """
    numbers, lowest = {start: 0}, {start: 0}  # lowest: the first open definition that it leads to
    open_ = {start: None}  # in the order of their numbers
    path = [(start, iter(definitions[start].names))]
    while path:
        name, rest = path[-1]
        following = next((other for other in rest if other in definitions), None)
        if following is None:
            path.pop()
            if path:
                lowest[path[-1][0]] = min(lowest[path[-1][0]], lowest[name])
            if lowest[name] == numbers[name]:
                yield _closed(open_, name)
        elif following not in numbers:
            numbers[following] = lowest[following] = len(numbers)
            open_[following] = None
            path.append((following, iter(definitions[following].names)))
        elif following in open_:
            lowest[name] = min(lowest[name], numbers[following])


def _closed(open_: dict[str, None], first: str) -> set[str]:
    """Take the definitions from `first` on out of `open_`."""
    found = {open_.popitem()[0]}
    while first not in found:
        found.add(open_.popitem()[0])
    return found
