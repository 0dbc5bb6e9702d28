"""The depth at which definitions lead to each other: references of a schema, rules of a grammar.

llguidance calls itself for each level. A chain of 900 references overflows a stack of 8 MB, which
ends the process.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.json_schemas import objects, subschemas_of

# Schemas in each other. Each takes 5 KB of the stack of llguidance, and a thread has 2 MB under
# `ulimit -s unlimited`.
MAX_LEVELS = 400
_ROOT = "#"
_MAX_STEPS = 20_000  # objects that are looked at again, because targets overlap


class Definition(NamedTuple):
    """`num_levels`: how deeply its text is nested. `names`: the definitions that it names, each
    with the deepest level that names it.
    """

    num_levels: int
    names: Mapping[str, int]


def check_levels(schema: dict[str, Any]) -> None:
    """Raise GrammarError if schemas lead to each other too deeply for a thread's stack."""
    if num_levels(schema) > MAX_LEVELS:
        raise GrammarError(f"$ref: references lead through more than {MAX_LEVELS} schemas")


def num_levels(schema: dict[str, Any]) -> int:
    """The most schemas in each other that a compiler goes through, or a larger number, where a
    reference leads into its target. Raises GrammarError if references overlap too often.

    Where the target of a reference depends on a base (`$id`), all possible targets count.
    """
    return References(schema).num_levels()


class References:
    """The targets of references in a schema, found in a number of steps that is bounded.

    Methods raise GrammarError when the steps are used up.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        self._num_left = _MAX_STEPS
        self._bases = [schema]
        self._anchors: dict[str, list[object]] = {}
        for node in objects(schema):
            self._num_left += 1
            ids = [name for key in ("$id", "id") if isinstance(name := node.get(key), str)]
            if ids and node is not schema:
                self._bases.append(node)
            for key in ("$anchor", "$dynamicAnchor"):
                if isinstance(name := node.get(key), str):
                    self._anchors.setdefault(name, []).append(node)
            for name in ids:  # "#name" is an anchor in older drafts
                self._anchors.setdefault(name.removeprefix("#"), []).append(node)

    def num_levels(self) -> int:
        definitions: dict[str, Definition] = {}
        waiting = [_ROOT]
        while waiting:
            if (reference := waiting.pop()) not in definitions:
                definitions[reference] = self._definition(reference)
                waiting += definitions[reference].names
        return longest_chain(definitions, _ROOT)

    def _definition(self, reference: str) -> Definition:
        deepest, names = 0, dict[str, int]()
        waiting = [(target, 1) for target in self.targets(reference)]
        while waiting:
            node, depth = waiting.pop()
            if not isinstance(node, dict):
                continue
            self._count()
            deepest = max(deepest, depth)
            if isinstance(name := node.get("$ref"), str):
                names[name] = max(depth, names.get(name, 0))
            waiting += (
                (inner, depth + 1) for _, inner in subschemas_of(node, with_definitions=False)
            )
        return Definition(deepest, names)

    def targets(self, reference: str) -> Iterator[object]:
        """Yield the targets that a reference may have; None where it leads to nothing."""
        fragment = unquote(reference.partition("#")[2])
        if fragment and not fragment.startswith("/"):
            yield from self._anchors.get(fragment, ())
            return
        steps = [step.replace("~1", "/").replace("~0", "~") for step in fragment.split("/")[1:]]
        for base in self._bases:
            yield self._inside(base, steps)

    def _inside(self, found: Any, steps: list[str]) -> object:
        """The target of a JSON pointer; None if there is nothing."""
        for step in steps:
            self._count()
            if isinstance(found, dict):
                found = found.get(step)
            elif isinstance(found, list):
                found = _item(found, step)
            else:
                return None
        return found

    def _count(self) -> None:
        self._num_left -= 1
        if self._num_left < 0:
            raise GrammarError("$ref: the targets of references overlap too often")


def _item(items: list[Any], step: str) -> object:
    """The item at an index as llguidance reads it: with a plus, and with zeros before."""
    digits = step.removeprefix("+").lstrip("0") or "0"
    is_index = digits.isdecimal() and len(digits) < 10 and int(digits) < len(items)
    return items[int(digits)] if is_index else None


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
