"""JSON schemas of Python types: of msgspec's kinds, and of pydantic models."""

import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import is_dataclass
from typing import Any, Protocol, TypeAlias, get_args

import msgspec

TypeSchema: TypeAlias = dict[str, Any]
NAIVE = "naive-date-time"  # a format of our own: a time without a zone
_BOUNDS = ("multiple_of", "le", "ge", "lt", "gt")  # of numbers, as pydantic names them


class PydanticType(Protocol):
    """The members of pydantic's TypeAdapter that are used. pydantic itself is never imported."""

    def json_schema(self, *, schema_generator: type) -> TypeSchema: ...

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


def _pydantic_schema(adapter: PydanticType) -> TypeSchema:
    """The schema as pydantic makes it, but a Decimal is a number, not any text too, and a time that
    must have no zone is no `date-time`, which has one.
    """
    generator: Any = sys.modules["pydantic.json_schema"].GenerateJsonSchema

    class TypeSchemaGenerator(generator):  # type: ignore[misc]
        def decimal_schema(self, schema: Any) -> Any:
            bounds = {name: float(schema[name]) for name in _BOUNDS if name in schema}
            return self.float_schema({"type": "float", **bounds})

        def datetime_schema(self, schema: Any) -> Any:
            is_naive = schema.get("tz_constraint") == "naive"
            made: TypeSchema = super().datetime_schema(schema)
            return {**made, "format": NAIVE} if is_naive else made

    return adapter.json_schema(schema_generator=TypeSchemaGenerator)


def schema_of(kind: Any) -> TypeSchema:
    """The JSON schema of a type, with closed objects. Raises TypeError for any other value."""
    own = type(kind)
    if issubclass(own, msgspec.Struct) or is_dataclass(own) or _is_model(own):
        raise TypeError(f"a value of {own.__name__} is no type; give {own.__name__} itself")
    try:
        adapter = pydantic_type(kind)
        plain = msgspec.json.schema(kind) if adapter is None else _pydantic_schema(adapter)
    except TypeError as error:  # the last line of msgspec's message names the type
        raise TypeError(str(error).splitlines()[-1]) from None
    schema = _inlined(plain)
    for each in list(subschemas(schema)):
        _close(each)
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
    # A copy: a definition that stays must not share its parts with the root.
    return {**deepcopy(root), "$defs": kept} if kept else root


def _references(value: Any) -> set[str]:
    if isinstance(value, list):
        return set().union(*map(_references, value))
    if not isinstance(value, dict):
        return set()
    own = value.get("$ref")
    return _references(list(value.values())) | ({own} if isinstance(own, str) else set())


def _close(schema: TypeSchema) -> None:
    """Add `additionalProperties: false`, if the schema names properties or their patterns."""
    schema.pop("uniqueItems", None)  # servers refuse it; a set takes each value once by itself
    if schema.get("format") == "decimal":  # msgspec's name; it reads numbers too
        del schema["format"]
        schema["type"] = "number"
    if "properties" in schema or "patternProperties" in schema:
        schema.setdefault("additionalProperties", False)


def subschemas(schema: Any) -> Iterator[TypeSchema]:
    """The schema and all schemas in it. Values such as those of `default` are no schemas."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key, part in schema.items():
        if key in ("properties", "patternProperties", "$defs"):
            part = list(part.values())
        elif key in ("items", "additionalProperties"):
            part = [part]
        elif key not in ("anyOf", "oneOf", "allOf", "prefixItems"):
            part = []
        for each in part:
            yield from subschemas(each)


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
