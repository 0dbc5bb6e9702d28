"""References of a JSON schema: how deeply they lead through it."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.chains import Definition, longest_chain
from sagellm.runtime.grammars.schema_walk import objects, subschemas_of

# Schemas in each other. Each takes 5 KB of the stack of llguidance, and a thread has 2 MB under
# `ulimit -s unlimited`.
MAX_LEVELS = 400
_ROOT = "#"
_MAX_STEPS = 20_000  # objects that are looked at again, because targets overlap


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
        """What a reference may lead to; None where it leads to nothing."""
        fragment = unquote(reference.partition("#")[2])
        if fragment and not fragment.startswith("/"):
            yield from self._anchors.get(fragment, ())
            return
        steps = [step.replace("~1", "/").replace("~0", "~") for step in fragment.split("/")[1:]]
        for base in self._bases:
            yield self._inside(base, steps)

    def _inside(self, found: Any, steps: list[str]) -> object:
        """What a JSON pointer leads to; None if there is nothing."""
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
