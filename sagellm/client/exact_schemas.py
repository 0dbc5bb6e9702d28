"""Exact JSON schemas: patterns bind texts such as dates, so that each answer has its type.

A format alone is not enough: grammars and servers take 2026-02-31 for a date.
"""

import re
from collections.abc import Iterator
from typing import Any

from msgspec import inspect as types

from sagellm.client.type_schemas import NAIVE, TypeSchema, pydantic_type, schema_of, subschemas

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAY = (
    "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
    "|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
)
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"  # no leap second in Python
_ZONE = "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_ZONES = {True: _ZONE, False: "", None: f"{_ZONE}?"}  # by msgspec's `tz`
_SECONDS = r"[0-9]{1,6}(?:\.[0-9]{1,6})?S"
_MINUTES = f"(?:[0-9]{{1,6}}M(?:{_SECONDS})?|{_SECONDS})"
_HOURS = f"T(?:[0-9]{{1,6}}H{_MINUTES}?|{_MINUTES})"
_DURATION = f"P(?:[0-9]{{1,6}}D(?:{_HOURS})?|{_HOURS})"  # a month has no length in Python
_UUID = "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_INTEGER = "-?(?:0|[1-9][0-9]{0,17})"
_FLOAT = rf"{_INTEGER}(?:\.[0-9]{{1,17}})?"

_PATTERNS = {
    "date-time": f"{_DATE}T{_TIME}{_ZONE}",
    "date": _DATE,
    "time": f"{_TIME}{_ZONE}",
    "duration": _DURATION,
    "uuid": _UUID,
    NAIVE: f"{_DATE}T{_TIME}",
}  # by the names of formats
_CLASSES = (types.StructType, types.TypedDictType, types.DataclassType, types.NamedTupleType)


def exact_schema_of(kind: Any) -> TypeSchema:
    """The schema of a type, like `schema_of`. Texts with dates, times, durations or base64, and the
    keys of maps, have the pattern of what the type reads.

    Patterns are long: the schema of a tool, which a prompt has, is better without them. Raises
    TypeError.
    """
    schema = schema_of(kind)
    if pydantic_type(kind) is None:
        definitions = dict(schema.get("$defs", {}))
        for node, info in list(_typed(schema, types.type_info(kind), definitions)):
            _bind(node, info)
    for each in list(subschemas(schema)):
        _bind_format(each)
    return schema


def _bind_format(schema: TypeSchema) -> None:
    """Add the pattern of its format to a text, and to the keys of a map."""
    kind = schema.get("type")
    if kind == "string" and (pattern := _PATTERNS.get(schema.get("format", ""))):
        schema.setdefault("pattern", f"^{pattern}$")
    keys = schema.get("propertyNames")
    if kind == "object" and isinstance(keys, dict):
        _bind_named_keys(schema, keys)


def _typed(
    node: TypeSchema, info: types.Type, definitions: dict[str, TypeSchema]
) -> Iterator[tuple[TypeSchema, types.Type]]:
    """Each schema inside of `node` with msgspec's description of its type. Empties `definitions`.

    msgspec's own schema has no trace of most types of texts.
    """
    while isinstance(info, types.Metadata):
        info = info.type
    if (reference := node.get("$ref")) is not None:
        found = definitions.pop(reference.rpartition("/")[2], None)
        if found is None:  # seen before
            return
        node = found
    yield node, info
    for part, inner in _parts(node, info):
        if isinstance(part, dict):  # not `items: false`
            yield from _typed(part, inner, definitions)


def _parts(node: TypeSchema, info: types.Type) -> Iterator[tuple[Any, types.Type]]:
    """The parts of a schema with the parts of its type."""
    if isinstance(info, _CLASSES):
        named = node.get("properties", {})
        yield from ((named.get(each.encode_name), each.type) for each in info.fields)
        # The fields of an array. The tag of a struct comes before them.
        fields = [each.type for each in reversed(info.fields)]
        yield from zip(reversed(node.get("prefixItems", ())), fields, strict=False)
    elif isinstance(info, types.CollectionType):
        yield node.get("items"), info.item_type
    elif isinstance(info, types.TupleType):
        yield from zip(node.get("prefixItems", ()), info.item_types, strict=False)
    elif isinstance(info, types.DictType):
        yield node.get("additionalProperties"), info.value_type
    elif isinstance(info, types.UnionType):
        # A union may have one type of texts, one of arrays and one of maps, and tagged structs.
        yield from zip(_options(node), sorted(info.types, key=_rank), strict=False)


def _options(node: TypeSchema) -> Iterator[TypeSchema]:
    for option in node.get("anyOf", ()):
        yield from _options(option) if "anyOf" in option else (option,)


def _rank(info: types.Type) -> int:
    """The place of a type among the options that msgspec writes: structs, then None, at the end."""
    if isinstance(info, types.NoneType):
        return 2
    return int(isinstance(info, types.StructType) and not info.array_like)


def _bind(node: TypeSchema, info: types.Type) -> None:
    if isinstance(info, types.DictType):
        if (keys := _key_pattern(info.key_type)) is not None:
            _bind_keys(node, f"^(?:{keys})$")
        return
    pattern = _text_pattern(info)
    if pattern is None or node.get("type") != "string":
        return
    for name in ("minLength", "maxLength"):  # the pattern counts bytes, these count characters
        node.pop(name, None)
    node.setdefault("pattern", f"^{pattern}$")


def _text_pattern(info: types.Type) -> str | None:
    """The texts that a type reads; None for types whose format says it, and for no texts."""
    match info:
        case types.DateTimeType():
            return f"{_DATE}T{_TIME}{_ZONES[info.tz]}"
        case types.TimeType():
            return f"{_TIME}{_ZONES[info.tz]}"
        case types.BytesType() | types.ByteArrayType() | types.MemoryViewType():
            return _base64(info.min_length or 0, info.max_length)
    return None


def _base64(least: int, most: int | None) -> str:
    """Base64 of `least` to `most` bytes."""
    ends = ("", "[A-Za-z0-9+/]{2}==", "[A-Za-z0-9+/]{3}=")  # by the number of bytes at the end
    options = []
    for rest, end in enumerate(ends):
        low = max(0, -((rest - least) // 3))
        high = "" if most is None else (most - rest) // 3
        if high == "" or low <= int(high):
            options.append(f"(?:[A-Za-z0-9+/]{{4}}){{{low},{high}}}{end}")
    return f"(?:{'|'.join(options)})"


def _key_pattern(info: types.Type) -> str | None:
    """The keys of a map, which JSON writes as texts; None for any text."""
    while isinstance(info, types.Metadata):
        info = info.type
    match info:
        case types.IntType():
            return _INTEGER
        case types.FloatType():
            return _FLOAT
        case types.UUIDType():
            return _UUID
        case types.DateType():
            return _DATE
        case types.TimeDeltaType():
            return _DURATION
        case types.LiteralType():
            return "|".join(re.escape(str(value)) for value in info.values)
        case types.EnumType():
            return "|".join(re.escape(str(each.value)) for each in info.cls)
    return _text_pattern(info)


def _bind_named_keys(schema: TypeSchema, keys: TypeSchema) -> None:
    """Replace `propertyNames`, which no grammar follows, if it is a pattern or a format."""
    if not set(keys) <= {"pattern", "format", "type", "title"}:
        return
    format_pattern = _PATTERNS.get(keys.get("format", ""))
    pattern = keys.get("pattern") or (format_pattern and f"^(?:{format_pattern})$")
    if pattern is not None:
        del schema["propertyNames"]
        _bind_keys(schema, pattern)


def _bind_keys(schema: TypeSchema, pattern: str) -> None:
    values = schema.pop("additionalProperties", {})
    schema["patternProperties"] = {pattern: values}
    schema["additionalProperties"] = False
