"""Options of oneOf that exclude each other are found, and no others."""

from typing import Any

import pytest

from sagellm.runtime.grammars.one_of import Disjointness

A, B = {"const": "a"}, {"const": "b"}
DEFINITIONS = {"A": {"type": "string"}, "B": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}


def tagged(tag: Any, **keywords: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"t": tag}, "required": ["t"], **keywords}


def holds(*options: Any) -> bool:
    return Disjointness({"$defs": DEFINITIONS}).holds(list(options))


@pytest.mark.parametrize(
    "options",
    [
        ({"type": "string"}, {"type": "integer"}),
        ({"type": ["string", "null"]}, {"type": ["array", "number"]}, {"type": "boolean"}),
        (A, B),
        (A, {"enum": ["b", "c"]}),
        ({"const": 1}, {"const": True}),
        (A, {"type": "integer"}),
        (tagged(A), tagged(B), tagged({"enum": ["c"]})),
        (tagged(A), tagged({"enum": ["b", "c"]})),
        (tagged({"type": "string"}), tagged({"type": "null"})),
        (tagged(A), {"type": "object", "properties": {"t": B}}),
        (tagged(A), {"type": "object", "additionalProperties": False}),
        (tagged(tagged(A)), tagged(tagged(B))),
        ({"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}),
        ({"allOf": [{"minLength": 2}, A]}, B),
        ({"anyOf": [A, {"type": "null"}]}, {"oneOf": [B, {"type": "integer"}]}),
        (False, {}),
        ({},),
    ],
)
def test_these_exclude_each_other(options: tuple[Any, ...]) -> None:
    assert holds(*options)
    assert holds(*reversed(options))


@pytest.mark.parametrize(
    "options",
    [
        ({}, {"type": "string"}),
        (True, A),
        ({"type": "number"}, {"type": "integer"}),
        ({"const": 1}, {"const": 1.0}),
        (A, {"enum": ["b", "a"]}),
        ({"type": "string"}, {"type": "string", "minLength": 3}),
        (tagged(A), tagged(A)),
        # Without the property, both may match; so may a text, where no type is given.
        ({"type": "object", "properties": {"t": A}}, {"type": "object", "properties": {"t": B}}),
        ({"properties": {"t": A}, "required": ["t"]}, {"properties": {"t": B}, "required": ["t"]}),
        (
            tagged(A),
            {"type": "object", "patternProperties": {"t": A}, "additionalProperties": False},
        ),
        ({"$ref": "#/$defs/A"}, {"$ref": "#/$defs/nothing"}),
        ({"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/loop"}),
        ({"$ref": "http://x/A"}, {"type": "integer"}),
        ({"anyOf": [A, B]}, B),
        ({"type": 5}, {"enum": 7}),
    ],
)
def test_these_may_match_together(options: tuple[Any, ...]) -> None:
    assert not holds(*options)


@pytest.mark.parametrize("options", [None, [], {}, "text", [1, 2]])
def test_what_is_no_list_of_options_is_left_alone(options: Any) -> None:
    assert not Disjointness({}).holds(options)


def test_comparisons_are_bounded() -> None:
    many = [{"anyOf": [{"minLength": one}, {"maxLength": one}]} for one in range(3000)]
    assert not holds(*many)
