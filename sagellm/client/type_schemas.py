"""JSON schemas of Python types: of msgspec's kinds, and of pydantic models."""

from typing import Any, Protocol, TypeAlias, runtime_checkable

import msgspec

TypeSchema: TypeAlias = dict[str, Any]


@runtime_checkable
class PydanticModel(Protocol):
    """The members of a pydantic model class that are used. pydantic itself is never imported."""

    def model_json_schema(self) -> TypeSchema: ...

    def model_validate_json(self, json_data: str) -> Any: ...


def schema_of(kind: Any) -> TypeSchema:
    """The JSON schema of a type, with closed objects. Raises TypeError for any other value."""
    try:
        is_pydantic = isinstance(kind, PydanticModel)
        plain = kind.model_json_schema() if is_pydantic else msgspec.json.schema(kind)
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
