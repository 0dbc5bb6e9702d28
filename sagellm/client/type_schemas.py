"""JSON schemas of Python types: of msgspec's kinds, and of pydantic models."""

import sys
from dataclasses import is_dataclass
from typing import Any, Protocol, TypeAlias, get_args

import msgspec

TypeSchema: TypeAlias = dict[str, Any]


class PydanticType(Protocol):
    """The members of pydantic's TypeAdapter that are used. pydantic itself is never imported."""

    def json_schema(self) -> TypeSchema: ...

    def validate_json(self, data: str, /) -> Any: ...


def pydantic_type(kind: Any) -> PydanticType | None:
    """The adapter of a type that is a pydantic model or has one inside; None for other types.

    Raises TypeError for a type that pydantic cannot read, such as a model beside a msgspec.Struct.
    """
    if not _has_model(kind):
        return None
    try:
        adapter: PydanticType = sys.modules["pydantic"].TypeAdapter(kind)
    except RuntimeError as error:  # the base of pydantic's errors of a type
        raise TypeError(str(error).splitlines()[0]) from None
    return adapter


def _has_model(kind: Any) -> bool:
    return _is_model(kind) or any(map(_has_model, get_args(kind)))


def _is_model(kind: Any) -> bool:
    pydantic = sys.modules.get("pydantic")  # imported, if there is a model
    return pydantic is not None and isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)


def schema_of(kind: Any) -> TypeSchema:
    """The JSON schema of a type, with closed objects. Raises TypeError for any other value."""
    own = type(kind)
    if issubclass(own, msgspec.Struct) or is_dataclass(own) or _is_model(own):
        raise TypeError(f"a value of {own.__name__} is no type; give {own.__name__} itself")
    try:
        adapter = pydantic_type(kind)
        plain = msgspec.json.schema(kind) if adapter is None else adapter.json_schema()
    except TypeError as error:  # the last line of msgspec's message names the type
        raise TypeError(str(error).splitlines()[-1]) from None
    schema: TypeSchema = _closed(_inlined(plain))
    return schema


def _inlined(schema: TypeSchema) -> TypeSchema:
    """The schema with its root in place of a reference: OpenAI wants an object there."""
    reference = schema.get("$ref")
    if reference is None:
        return schema
    definitions: dict[str, TypeSchema] = schema["$defs"]
    name = reference.rpartition("/")[2]
    root = definitions[name]
    others = {key: each for key, each in definitions.items() if key != name}
    kept = definitions if reference in _references([root, *others.values()]) else others
    return {**root, "$defs": kept} if kept else dict(root)


def _references(value: Any) -> set[str]:
    if isinstance(value, list):
        return set().union(*map(_references, value))
    if not isinstance(value, dict):
        return set()
    own = value.get("$ref")
    return _references(list(value.values())) | ({own} if isinstance(own, str) else set())


def _closed(schema: Any) -> Any:
    """The schema with `additionalProperties: false` in each object that lists its properties."""
    if not isinstance(schema, dict):
        return schema
    # Servers refuse what no grammar can hold: a set takes each value once by itself.
    kept = {key: part for key, part in schema.items() if key != "uniqueItems"}
    if kept.get("format") == "decimal":  # msgspec's name; it reads numbers too
        kept = {key: part for key, part in kept.items() if key != "format"} | {"type": "number"}
    found = {key: _closed_part(key, part) for key, part in kept.items()}
    return {"additionalProperties": False, **found} if "properties" in found else found


def _closed_part(key: str, part: Any) -> Any:
    """A keyword's value with its schemas closed. Values such as `default` are no schemas."""
    if key in ("properties", "$defs"):
        return {name: _closed(each) for name, each in part.items()}
    if key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        return [_closed(each) for each in part]
    return _closed(part) if key in ("items", "additionalProperties") else part


def is_strict(schema: Any) -> bool:
    """Whether OpenAI's strict mode takes a closed schema: each object requires all properties."""
    if isinstance(schema, list):
        return all(map(is_strict, schema))
    if not isinstance(schema, dict):
        return True
    properties = schema.get("properties")
    if schema.get("type") == "object":
        if schema.get("additionalProperties") is not False or not isinstance(properties, dict):
            return False
        if set(schema.get("required", ())) != properties.keys():
            return False
    return all(map(is_strict, schema.values()))


def type_name(kind: Any) -> str:
    """The name of a type for messages."""
    return getattr(kind, "__name__", None) or str(kind)
