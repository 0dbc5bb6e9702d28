"""JSON schemas: what is changed before they are compiled, and which texts they allow."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grammar_walks import RandomModel, allowed, check_answer, eos_of, json_compiler, json_tokenizer

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.grammar_compiler import check_grammar
from sagellm.runtime.grammars.json_schemas import FORMATS, UNKNOWN_FORMATS, read_schema, schema_text
from sagellm.runtime.sampling import Grammar

TOKENS = json_tokenizer()
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
VALUE = {"name": "x", "tags": [1, 2]}


def grammar(schema: dict[str, Any]) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(schema))


def takes(schema: dict[str, Any], text: str) -> bool:
    """Whether the text is a whole answer."""
    matcher = json_compiler().compile(grammar(schema), "", ignores_eos=False)
    follows = allowed(matcher, TOKENS.encode(text))
    return eos_of(TOKENS) in follows and len(follows) < matcher.vocab_size


def prepared(schema: dict[str, Any]) -> Any:
    return json.loads(schema_text(json.loads(json.dumps(schema))))


@pytest.mark.parametrize("indent", [None, 0, 2, 4, 8, "\t"])
@pytest.mark.parametrize("separators", [None, (",", ":"), (" , ", " : ")])
def test_values_as_json_writes_them_are_taken(indent: Any, separators: Any) -> None:
    assert takes(PERSON, json.dumps(VALUE, indent=indent, separators=separators))


@pytest.mark.parametrize(
    "text",
    [
        '{"name":   "x","tags":[]}',
        '{"name":\n\n"x","tags":[]}',
        '{"name":\n' + " " * 41 + '"x","tags":[]}',
        ' {"name":"x","tags":[]}',
        '{"name":"x","tags":[]}\n',
    ],
)
def test_runs_of_blanks_are_bounded(text: str) -> None:
    assert takes(PERSON, '{"name": "x","tags":[]}')
    assert not takes(PERSON, text)


def test_properties_keep_the_order_of_the_schema() -> None:
    assert not takes(PERSON, '{"tags":[],"name":"x"}')


def test_options_of_the_client_are_replaced() -> None:
    options = {"whitespace_pattern": "x", "lenient": True, "coerce_one_of": True}
    assert not takes({**PERSON, "x-guidance": options}, '{"name":x"x","tags":[]}')
    with pytest.raises(GrammarError, match="not supported: not"):
        check_grammar(grammar({"not": {}, "x-guidance": options}))
    nested = {"properties": {"a": {"x-guidance": options, "type": "object"}}, "type": "object"}
    assert not takes(nested, '{"a":{x}}')


def pydantic_union(discriminator: str) -> dict[str, Any]:
    def animal(name: str) -> dict[str, Any]:
        tag = {"const": name, "title": "Kind", "type": "string"}
        properties = {"kind": tag, "age": {"type": "integer"}}
        return {"properties": properties, "required": [*properties], "type": "object"}

    names = ("cat", "dog")
    mapping = {name: f"#/$defs/{name}" for name in names}
    union = {
        "discriminator": {"mapping": mapping, "propertyName": "kind"},
        discriminator: [{"$ref": f"#/$defs/{name}"} for name in names],
    }
    return {"$defs": {name: animal(name) for name in names}, "properties": {"pet": union},
            "required": ["pet"], "type": "object"}  # fmt: skip


def test_a_tagged_union_of_pydantic_is_taken() -> None:
    assert takes(pydantic_union("oneOf"), '{"pet": {"kind": "dog", "age": 3}}')
    assert not takes(pydantic_union("oneOf"), '{"pet": {"kind": "cow", "age": 3}}')
    assert prepared(pydantic_union("oneOf")) == prepared(pydantic_union("anyOf"))


def test_one_of_beside_any_of_stays() -> None:
    both = {"anyOf": [{}], "oneOf": [{"type": "string"}, {"type": "null"}]}
    assert prepared(both).keys() == {*both, "x-guidance"}
    assert takes(both, '"x"')


def test_keywords_in_data_are_no_keywords() -> None:
    data = {"uniqueItems": False, "oneOf": [{"type": "string"}, {"type": "null"}]}
    schema = {"const": data, "examples": [data], "default": data}
    assert prepared(schema)["const"] == data
    assert takes(schema, json.dumps(data))


def test_references_in_a_part_with_a_base_of_its_own_are_not_followed() -> None:
    union = pydantic_union("oneOf")
    union["properties"]["pet"] = {"$id": "http://x/", **union["properties"]["pet"]}
    assert "oneOf" in json.dumps(prepared(union))
    assert "oneOf" not in json.dumps(prepared({"$id": "http://x/", **pydantic_union("oneOf")}))


def test_unique_items_may_be_false() -> None:
    assert takes({"type": "array", "uniqueItems": False, "items": {"type": "integer"}}, "[1,1]")
    with pytest.raises(GrammarError, match="uniqueItems"):
        check_grammar(grammar({"type": "array", "uniqueItems": True}))


@pytest.mark.parametrize("multiple", [1, 2, 0.01, 0.5, 1000, 1e10, 2.5e-7, 7.5, 12_000])
def test_multiples_of_few_digits_are_compiled(multiple: float) -> None:
    schema_text({"type": "number", "multipleOf": multiple})


@pytest.mark.parametrize("text", ["", "nul", "[]", "5", '"x"', "[" * 10**5, "{'a':1}", "\ud800"])
def test_only_an_object_is_a_schema(text: str) -> None:
    with pytest.raises(GrammarError):
        read_schema(text)


def table_row(name: str) -> str:
    text = (Path(__file__).parents[3] / "docs" / "structured-output.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("|") and name in line]
    return row


def test_documented_keywords_are_refused() -> None:
    names = re.findall(r"`([^`]+)`", table_row("`unevaluatedItems`"))
    assert len(names) > 10
    for name in names:
        keyword, _, value = name.partition(": ")
        with pytest.raises(GrammarError, match=re.escape(f"not supported: {keyword}")):
            check_grammar(grammar({keyword: json.loads(value or "{}")}))


def test_documented_formats_are_taken() -> None:
    _, *names = re.findall(r"`([^`]+)`", table_row("`ipv6`"))
    assert len(names) == 10
    for name in names:
        check_grammar(grammar({"type": "string", "format": name}))
    assert set(names) == FORMATS


@pytest.mark.parametrize("name", sorted(UNKNOWN_FORMATS))
def test_other_formats_of_the_standard_are_refused(name: str) -> None:
    with pytest.raises(GrammarError, match="format"):
        check_grammar(grammar({"type": "string", "format": name}))


CASES: Sequence[tuple[dict[str, Any], str, bool]] = [
    ({"type": "integer", "minimum": -3, "exclusiveMaximum": 12}, "11", True),
    ({"type": "integer", "minimum": -3, "exclusiveMaximum": 12}, "12", False),
    ({"type": "integer", "multipleOf": 7}, "49", True),
    ({"type": "integer", "multipleOf": 7}, "50", False),
    ({"type": "string", "minLength": 2, "maxLength": 3}, '"日本"', True),
    ({"type": "string", "minLength": 2, "maxLength": 3}, '"日"', False),
    ({"type": "string", "pattern": "b+"}, '"abbc"', True),
    ({"type": "string", "pattern": "^b+$"}, '"abbc"', False),
    ({"type": "string", "format": "date"}, '"2025-02-28"', True),
    ({"type": "string", "format": "uuid"}, '"nothing"', False),
    ({"type": "string", "format": "binary", "maxLength": 3}, '"abc"', True),
    ({"type": "string", "format": "binary", "maxLength": 3}, '"abcd"', False),
    ({"type": "array", "prefixItems": [{"const": 1}], "items": False}, "[1]", True),
    ({"type": "array", "prefixItems": [{"const": 1}], "items": False}, "[1,2]", False),
    ({"type": "array", "items": {"type": "null"}, "maxItems": 1}, "[null,null]", False),
    ({"enum": [{"a": [1, None]}, "x"]}, '{"a":[1,null]}', True),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, '{"k":1}', True),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, '{"k":"v"}', False),
    ({"type": "object", "patternProperties": {"^a": {"type": "integer"}}}, '{"ab":1}', True),
    ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 4}]}, "5", False),
    ({"type": "array", "items": [{"type": "string"}], "additionalItems": False}, '["a"]', True),
    ({"type": "array", "items": [{"type": "string"}], "additionalItems": False}, "[1]", False),
    ({"$anchor": "a", "type": "array", "items": {"$ref": "#a"}}, "[[]]", True),
    ({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": False},
     "{}", True),
    ({"type": "integer"}, "1.0", False),
    ({"type": "string"}, '"\\u0041"', False),
    ({"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}},
     "[[],[[]]]", True),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "text", "expected"), CASES)
def test_keywords_have_their_meaning(schema: dict[str, Any], text: str, expected: bool) -> None:
    assert takes(schema, text) is expected


def test_a_thousand_lines_of_a_large_schema_are_followed() -> None:
    names = [f"property_{number}" for number in range(500)]
    kinds = [{"type": "string", "maxLength": 9}, {"type": "integer"}, {"enum": ["on", "off"]}]
    schema = {
        "type": "object",
        "properties": {name: kinds[number % 3] for number, name in enumerate(names)},
        "required": names[::2],
        "additionalProperties": False,
    }
    model = RandomModel(TOKENS, np.random.default_rng(0))
    matcher = json_compiler().compile(grammar(schema), "", ignores_eos=False)
    output, is_finished = model.answer(matcher, 12_000)
    assert is_finished
    check_answer(schema, TOKENS.decode(output))
