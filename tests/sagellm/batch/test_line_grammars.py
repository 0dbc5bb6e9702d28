import json
from typing import Any

import pytest

from sagellm.batch.prompt_lines import LineError, LineRequest, parse_line
from sagellm.runtime.grammars import choice_grammar, json_object_grammar
from sagellm.runtime.sampling import Grammar, Sampling

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
NAMED = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
OF_SCHEMA = Grammar(kind="json_schema", text=json.dumps(SCHEMA, separators=(",", ":")))
DIGITS = Grammar(kind="regex", text="[0-9]+")


def read(fields: dict[str, Any], defaults: Sampling | None = None) -> LineRequest:
    raw = json.dumps({"prompt": "a", **fields}).encode()
    return parse_line(1, raw, defaults or Sampling())


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"grammar": {"kind": "regex", "text": "[0-9]+"}}, DIGITS),
        ({"response_format": NAMED}, OF_SCHEMA),
        ({"response_format": {"type": "json_object"}}, json_object_grammar()),
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {"json": SCHEMA}}, OF_SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, OF_SCHEMA),
        ({"structured_outputs": {"json_object": True}}, json_object_grammar()),
        ({"structured_outputs": {"regex": "[0-9]+"}}, DIGITS),
        ({"structured_outputs": {"choice": ["a", "b"]}}, choice_grammar(["a", "b"])),
        (
            {"structured_outputs": {"grammar": 'start: "a"'}},
            Grammar(kind="lark", text='start: "a"'),
        ),
        ({"response_format": None, "grammar": None, "structured_outputs": None}, None),
    ],
)
def test_a_line_binds_its_answer(fields: dict[str, Any], grammar: Grammar | None) -> None:
    assert read(fields).sampling.grammar == grammar


def test_a_line_of_a_batch_file_does_too() -> None:
    body = {"prompt": "a", "response_format": NAMED}
    raw = json.dumps({"custom_id": "x", "body": body}).encode()
    assert parse_line(1, raw, Sampling()).sampling.grammar == OF_SCHEMA


def test_a_line_overrides_the_grammar_of_the_command() -> None:
    defaults = Sampling(grammar=json_object_grammar())
    assert read({}, defaults).sampling.grammar == json_object_grammar()
    assert (
        read({"grammar": {"kind": "regex", "text": "[0-9]+"}}, defaults).sampling.grammar == DIGITS
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"structured_outputs": {}}, "exactly one of json"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "exactly one of json"),
        ({"structured_outputs": {"choice": []}}, "length >= 1"),
        ({"response_format": {"type": "json_schema"}}, "json_schema: is missing"),
        ({"response_format": {**NAMED, "type": "text"}}, "only for the type `json_schema`"),
        ({"response_format": {"type": "xml"}}, "Invalid enum value"),
        ({"response_format": NAMED, "structured_outputs": {"regex": "a"}}, "give one of them"),
        (
            {"response_format": NAMED, "grammar": {"kind": "regex", "text": "a"}},
            "give one of `grammar`",
        ),
        ({"structured_outputs": {"json": "[]"}}, "must be a JSON schema"),
        ({"grammar": {"kind": "regex", "text": "("}}, "the line's grammar is wrong"),
        ({"gramar": {}}, "did you mean `grammar`"),
    ],
)
def test_a_line_that_binds_in_no_right_way_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(LineError, match=said):
        read(fields)
