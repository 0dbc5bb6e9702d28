"""Readers of the JSON schemas of arguments, for the grammars of tools."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from sagellm.chat_formats.chat_format import ToolSpec, UnboundSchema

ToolSchema: TypeAlias = Mapping[str, Any]

_MAX_REFERENCES = 32  # a longer chain of `$ref` may be a circle
_MAX_OPTIONS = 1024  # the types of more options are not read: the event loop would wait
# The keywords of an object that grammars of arguments know where the arguments are not JSON.
OBJECT_KEYWORDS = frozenset({"type", "properties", "required", "additionalProperties"})
_DOCUMENTS = frozenset(
    {"$schema", "$id", "$defs", "definitions", "title", "description", "default"}
)
_ANY_TYPE = frozenset({"string", "number", "boolean", "null", "array", "object"})


class Member(NamedTuple):
    """A property of an object. `schema` has no `$ref` at its top."""

    name: str
    schema: ToolSchema
    is_required: bool


def schema_of(tool: ToolSpec) -> ToolSchema:
    return {"type": "object", **(tool.parameters or {})}


def definitions(root: ToolSchema) -> ToolSchema:
    """The keywords of a schema to which the `$ref` of its parts lead."""
    return {key: root[key] for key in ("$defs", "definitions") if key in root}


def members_of(schema: ToolSchema, root: ToolSchema) -> list[Member]:
    """The properties of an object schema, required ones first. `root`: where `$ref` leads to."""
    properties, required = _properties(schema), dict.fromkeys(_required(schema))
    members = [
        Member(name, resolved(properties.get(name, {}), root), name in required)
        for name in (*properties, *(name for name in required if name not in properties))
    ]
    return sorted(members, key=lambda member: not member.is_required)


def member_schema(schema: ToolSchema, name: str, root: ToolSchema) -> ToolSchema | None:
    """The schema of one property of an object schema; None if the schema does not name it."""
    properties = _properties(schema)
    if name in properties:
        return resolved(properties[name], root)
    return {} if name in _required(schema) else None


def _properties(schema: ToolSchema) -> ToolSchema:
    return _mapping(schema.get("properties"))


def _required(schema: ToolSchema) -> Iterator[str]:
    return (name for name in _list(schema.get("required")) if isinstance(name, str))


def _mapping(value: Any) -> Mapping[str, Any]:
    """The value of a keyword, or nothing: clients may write anything, and parsers never fail."""
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    """Return the value if it is an array, else an empty one."""
    return value if isinstance(value, list | tuple) else ()


def resolved(schema: Any, root: ToolSchema) -> ToolSchema:
    """The schema that `$ref` leads to. An unknown or circular reference allows any value, as does
    the schema true.
    """
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping):
            return {}
        if "$ref" not in schema:
            return schema
        schema = _target(str(schema["$ref"]), root)
    return {}


def _target(reference: str, root: ToolSchema) -> Any:
    found: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def alternatives(schema: ToolSchema, root: ToolSchema) -> list[ToolSchema]:
    """The schemas of which a value may satisfy one: those of `anyOf` or `oneOf`, or itself."""
    return [resolved(one, root) for one in _options(schema)] or [schema]


def _options(schema: ToolSchema) -> Sequence[Any]:
    return _list(schema.get("anyOf", schema.get("oneOf")))


def constants(schema: ToolSchema) -> list[Any] | None:
    """The values of `enum` or `const`, or None."""
    if "const" in schema:
        return [schema["const"]]
    given = schema.get("enum")
    return list(given) if isinstance(given, list | tuple) else None


def types_of(schema: ToolSchema, root: ToolSchema) -> frozenset[str]:
    """The JSON types that a value may have; "number" includes integers."""
    types: set[str] = set()
    found = {id(schema): schema}
    unread = [schema]
    while unread:
        one = unread.pop()
        options = _options(one)
        if len(found) + len(options) > _MAX_OPTIONS:
            return _ANY_TYPE
        if not options:
            types.update(_own_types(one))
        for option in (resolved(option, root) for option in options):
            if id(option) not in found:  # a schema may lead to itself
                found[id(option)] = option
                unread.append(option)
    return frozenset(types)


def _own_types(schema: ToolSchema) -> Iterable[str]:
    values, given = constants(schema), schema.get("type")
    if values is not None:
        return map(type_of, values)
    names = [given] if isinstance(given, str) else _list(given)
    if not names:
        return _ANY_TYPE
    return ("number" if name == "integer" else str(name) for name in names)


def length_bounds(schema: ToolSchema) -> tuple[int, int | None] | None:
    """The least and the greatest length of a text (None: any), or None if it has any length."""
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    return None if (least, most) == (0, None) else (least, most)


def type_of(value: Any) -> str:
    """The JSON type of a value."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    names = {str: "string", type(None): "null", list: "array", dict: "object"}
    return names.get(type(value), "object")


def check_bound(tool: ToolSpec, schema: ToolSchema, known: frozenset[str]) -> None:
    """Raise UnboundSchema if a strict tool has a keyword in a schema that is not `known`."""
    unknown = sorted(set(schema) - known - _DOCUMENTS)
    if tool.strict and unknown:
        raise UnboundSchema(
            f"the schema of a strict tool has {unknown[0]!r}, which this model's form of arguments "
            "cannot bind; leave it out, or leave `strict` out"
        )


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return _is_list(value) and all(map(_is_text, value))


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_SHAPES: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), _is_map),
    **dict.fromkeys(("enum", "anyOf", "oneOf", "allOf"), _is_list),
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength"), _is_length),
    **dict.fromkeys(("$ref", "pattern", "format"), _is_text),
    "required": _is_names,
    "type": lambda value: _is_text(value) or (_is_names(value) and bool(value)),
}


def check_shape(schema: ToolSchema) -> None:
    """Raise UnboundSchema for a keyword whose value has a wrong type, anywhere in the schema."""
    for key, has_shape in _SHAPES.items():
        if key in schema and not has_shape(schema[key]):
            raise UnboundSchema(f"the schema has a wrong value of {key!r}")
    for part in _parts_of(schema):
        check_shape(part)


_SCHEMA_KEYS = ("items", "additionalProperties")
_LIST_KEYS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAP_KEYS = ("properties", "patternProperties", "$defs", "definitions")
# The keywords that llguidance 1.9 implements; it refuses schemas with others.
_IMPLEMENTED = frozenset(
    {
        *(*_SCHEMA_KEYS, *_LIST_KEYS, *_MAP_KEYS, *_DOCUMENTS),
        *("type", "enum", "const", "$ref", "required", "minItems", "maxItems"),
        *("minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    }
) - {"oneOf"}
_FORMATS = frozenset(
    {
        *("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"),
        *("uri",),
    }
)


def loosened(schema: ToolSchema) -> dict[str, Any]:
    """The schema without keywords that no grammar can express. It allows at least the same values.

    `oneOf` becomes `anyOf`: a grammar cannot count the options that a value satisfies.
    """
    kept: dict[str, Any] = {}
    for name, value in schema.items():
        key = "anyOf" if name == "oneOf" and "anyOf" not in schema else name
        if key in _IMPLEMENTED and (key != "format" or _is_known_format(value)):
            kept[key] = _changed_at(key, value, loosened)
    return kept


def _is_known_format(value: Any) -> bool:
    return isinstance(value, str) and value in _FORMATS


_JOINS = frozenset({"anyOf", "oneOf", "$ref"})


def closed(schema: ToolSchema) -> ToolSchema:
    """The schema, where an object has the properties that its schema names and no others.

    Few functions take arguments that they do not name, and small models write such arguments
    without an end. A schema that joins objects stays as it is: its parts would exclude each other.
    """
    return schema if _joins_objects(schema) else _closed(schema)


def _closed(schema: ToolSchema) -> dict[str, Any]:
    kept = {key: _changed_at(key, value, _closed) for key, value in schema.items()}
    is_open = "additionalProperties" in kept or "patternProperties" in kept
    if not is_open and _names_all(kept.get("properties"), kept.get("required", [])):
        kept["additionalProperties"] = False
    return kept


def _names_all(properties: Any, required: Any) -> bool:
    """Whether there are properties, and the required ones are among them."""
    if not isinstance(properties, Mapping) or not isinstance(required, list | tuple):
        return False
    return all(isinstance(name, str) and name in properties for name in required)


def _joins_objects(schema: ToolSchema) -> bool:
    """Whether an object must satisfy several schemas at once, anywhere in the schema."""
    if "allOf" in schema or ("properties" in schema and not _JOINS.isdisjoint(schema)):
        return True
    return any(map(_joins_objects, _parts_of(schema)))


def _parts_of(schema: ToolSchema) -> Iterator[ToolSchema]:
    """The schemas that are directly in a schema."""
    for key, value in schema.items():
        found: Iterable[Any] = ()
        if key in _SCHEMA_KEYS:
            found = [value]
        elif key in _LIST_KEYS and isinstance(value, list | tuple):
            found = value
        elif key in _MAP_KEYS and isinstance(value, Mapping):
            found = value.values()
        yield from (one for one in found if isinstance(one, Mapping))


def _changed_at(key: str, value: Any, change: Callable[[ToolSchema], ToolSchema]) -> Any:
    """The value of a keyword, with all schemas in it changed."""
    if key in _SCHEMA_KEYS and isinstance(value, Mapping):
        return change(value)
    if key in _LIST_KEYS and isinstance(value, list | tuple):
        return [change(one) if isinstance(one, Mapping) else one for one in value]
    if key in _MAP_KEYS and isinstance(value, Mapping):
        return {
            name: change(one) if isinstance(one, Mapping) else one for name, one in value.items()
        }
    return value
