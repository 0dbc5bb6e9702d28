from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NotRequired, TypedDict

import msgspec
import pydantic
import pytest

from sagellm.client.type_schemas import is_strict, schema_of
from sagellm.runtime.grammars.grammar_compiler import check_grammar
from sagellm.runtime.sampling import Grammar


class Place(msgspec.Struct):
    name: str
    twin: "Place | None" = None


class Traveller(msgspec.Struct):
    name: str
    place: Place
    tags: dict[str, int] = {}


@dataclass
class Point:
    x: int
    y: float


class Options(TypedDict):
    a: int
    b: NotRequired[int]


class Leaf(pydantic.BaseModel):
    size: int = 3


class Tree(pydantic.BaseModel):
    leaves: list[Leaf]


def test_the_root_is_an_object_and_no_reference() -> None:
    assert schema_of(Point) == {
        "additionalProperties": False,
        "title": "Point",
        "type": "object",
        "properties": {"x": {"type": "integer"}, "y": {"type": "number"}},
        "required": ["x", "y"],
    }


def test_a_type_inside_is_a_definition_and_closed_too() -> None:
    schema = schema_of(Traveller)
    assert schema["properties"]["place"] == {"$ref": "#/$defs/Place"}
    assert schema["$defs"]["Place"]["additionalProperties"] is False
    assert schema["required"] == ["name", "place"]


class Branch(pydantic.BaseModel):
    branches: "list[Branch]"


@pytest.mark.parametrize("kind", [Place, Branch])
def test_a_type_that_holds_itself_stays_a_definition(kind: Any) -> None:
    schema = schema_of(kind)
    assert schema["$defs"][kind.__name__]["properties"] == schema["properties"]


def test_an_open_map_stays_open() -> None:
    assert schema_of(Traveller)["properties"]["tags"]["additionalProperties"] == {"type": "integer"}


def test_a_default_is_no_schema() -> None:
    class Holder(pydantic.BaseModel):
        value: dict[str, int] = {"properties": 1}

    assert schema_of(Holder)["properties"]["value"]["default"] == {"properties": 1}


def test_a_pydantic_model_gives_its_own_schema_closed() -> None:
    schema = schema_of(Tree)
    assert schema["required"] == ["leaves"]
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Leaf"]["additionalProperties"] is False


@pytest.mark.parametrize(
    ("kind", "strict"),
    [(Point, True), (Place, False), (Traveller, False), (Options, False), (list[Point], True)],
)
def test_strict_is_said_where_every_property_is_required(kind: Any, strict: bool) -> None:
    assert is_strict(schema_of(kind)) is strict


class Bill(msgspec.Struct):
    format: Decimal
    uniqueItems: frozenset[int]


def test_numbers_and_sets_are_bound_to_what_a_grammar_can_hold() -> None:
    schema = schema_of(Bill)
    check_grammar(Grammar(kind="json_schema", text=msgspec.json.encode(schema).decode()))
    assert schema["properties"]["format"] == {"type": "number"}
    text = b'{"format": 1.10, "uniqueItems": [1, 1]}'
    assert msgspec.json.decode(text, type=Bill) == Bill(Decimal("1.10"), frozenset({1}))


@pytest.mark.parametrize("value", ["json", 3, object, print])
def test_what_is_no_type_with_a_schema_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="not supported"):
        schema_of(value)
