"""Whether the options of `oneOf` exclude each other, as those of tagged unions do."""

from typing import Any

_MAX_STEPS = 5_000  # comparisons for one schema
_MAX_DEPTH = 16
TYPES = ("null", "boolean", "number", "string", "array", "object")


class Disjointness:
    """Finds pairs of schemas in one document that no value can match both.

    It may miss such a pair, and never finds another.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._num_left = _MAX_STEPS

    def holds(self, options: object) -> bool:
        """Whether no value matches two of the options."""
        if not isinstance(options, list) or not options:
            return False
        return self._have_tags(options) or all(
            self._differ(one, other, _MAX_DEPTH)
            for index, one in enumerate(options)
            for other in options[index + 1 :]
        )

    def _have_tags(self, options: list[object]) -> bool:
        """Whether all are of objects with a required property that has another text in each."""
        schemas = [self._target(one.get("$ref")) or one for one in options if isinstance(one, dict)]
        found = [one for one in schemas if isinstance(one, dict) and one.get("type") == "object"]
        if len(found) < len(options):
            return False
        tags = ([_tag(one, name) for one in found] for name in _required(found[0]))
        return any(None not in each and len(set(each)) == len(each) for each in tags)

    def _differ(self, one: object, other: object, depth: int) -> bool:
        if one is False or other is False:
            return True
        if not isinstance(one, dict) or not isinstance(other, dict):
            return False
        self._num_left -= 1
        if depth == 0 or self._num_left < 0:
            return False
        return (
            _differ_in_values(one, other)
            or self._differ_in_properties(one, other, depth - 1)
            or self._differ_in_parts(one, other, depth - 1)
            or self._differ_in_parts(other, one, depth - 1)
        )

    def _differ_in_parts(self, one: dict[str, Any], other: dict[str, Any], depth: int) -> bool:
        """Whether what `one` refers to, or includes, excludes `other`."""
        parts = [self._target(one.get("$ref"))]
        if isinstance(included := one.get("allOf"), list):
            parts += included
        if any(self._differ(part, other, depth) for part in parts):
            return True
        for key in ("anyOf", "oneOf"):
            options = one.get(key)
            if isinstance(options, list) and all(
                self._differ(option, other, depth) for option in options
            ):
                return True
        return False

    def _differ_in_properties(self, one: dict[str, Any], other: dict[str, Any], depth: int) -> bool:
        """Whether both are of objects with a required property that tells them apart."""
        if _types(one) != {"object"} or _types(other) != {"object"}:
            return False
        names = [name for name in (*_required(one), *_required(other)) if isinstance(name, str)]
        return any(
            self._differ(_property(one, name), _property(other, name), depth) for name in names
        )

    def _target(self, reference: object) -> object:
        """Return the target of a reference into the document; None if the target is not known."""
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return None
        found: Any = self._document
        for part in reference[2:].split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or "%" in name:
                return None
            found = found.get(name)
            if isinstance(found, dict) and ("$id" in found or isinstance(found.get("id"), str)):
                return None  # references in it lead elsewhere
        return found


def _types(schema: dict[str, Any]) -> set[str]:
    """The types that a value may have."""
    given = schema.get("type")
    names = {given} if isinstance(given, str) else set(TYPES)
    if isinstance(given, list):
        names = {name for name in given if isinstance(name, str)}
    names = {"number" if name == "integer" else name for name in names}
    values = _values(schema)
    return names if values is None else names & {_type_of(value) for value in values}


def _values(schema: dict[str, Any]) -> list[object] | None:
    """The values of `const` or `enum`; None: there are others."""
    if "const" in schema:
        return [schema["const"]]
    options = schema.get("enum")
    return options if isinstance(options, list) else None


def _type_of(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def _differ_in_values(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether types or listed values exclude each other. Types come first: 1 equals True here."""
    if not _types(one) & _types(other):
        return True
    first, second = _values(one), _values(other)
    if first is None or second is None or len(first) * len(second) > _MAX_STEPS:
        return False
    return not any(value in second for value in first)


def _tag(schema: dict[str, Any], name: object) -> str | None:
    """The only text that a required property may have; None: there are others."""
    if not isinstance(name, str) or name not in _required(schema):
        return None
    match _property(schema, name):
        case {"const": str(text)} | {"enum": [str(text)]}:
            return text
    return None


def _required(schema: dict[str, Any]) -> list[object]:
    names = schema.get("required")
    return names if isinstance(names, list) else []


def _property(schema: dict[str, Any], name: str) -> object:
    """The schema of a property; True: any value, or it is not known."""
    properties = schema.get("properties")
    if isinstance(properties, dict) and name in properties:
        return properties[name]
    if "patternProperties" in schema:
        return True
    return schema.get("additionalProperties", True)
