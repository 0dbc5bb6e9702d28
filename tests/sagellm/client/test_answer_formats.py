from typing import Any

import msgspec
import pydantic
import pytest

from sagellm.client.answer_formats import read_format, reader_of
from sagellm.client.responses import BAD_ANSWER, MISUSED, ClientError
from sagellm.runtime.grammars.grammar_compiler import check_grammar
from sagellm.runtime.sampling import Grammar


class Person(msgspec.Struct):
    name: str
    age: int


class Pet(msgspec.Struct):
    name: str


class Animal(pydantic.BaseModel):
    name: str


def get_weather(city: str) -> str:
    """The weather of a city."""
    return city


def test_a_type_becomes_a_named_schema() -> None:
    asked = read_format({"temperature": 0}, Person).fields
    form = asked["response_format"]
    assert (asked["temperature"], form["type"]) == (0, "json_schema")
    assert form["json_schema"]["name"] == "Person"
    assert form["json_schema"]["schema"]["required"] == ["name", "age"]
    assert form["json_schema"]["strict"] is True


def test_a_name_has_only_characters_that_openai_takes() -> None:
    kind = msgspec.defstruct("a" * 80, [("x", int)])
    assert read_format({}, kind).fields["response_format"]["json_schema"]["name"] == "a" * 64


@pytest.mark.parametrize(
    ("form", "is_read"),
    [({"type": "json_object"}, True), ({"type": "json_schema"}, True), ({"type": "text"}, False)],
)
def test_a_dict_goes_to_the_server_as_it_is(form: dict[str, Any], is_read: bool) -> None:
    asked = read_format({}, form)
    assert asked.fields == {"response_format": form}
    assert (asked.read_value is not None) is is_read


@pytest.mark.parametrize(
    ("options", "outputs"),
    [
        ({"regex": "[0-9]+"}, {"regex": "[0-9]+"}),
        ({"choices": ("yes", "no")}, {"choice": ["yes", "no"]}),
        ({"grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
    ],
)
def test_a_text_is_bound_by_structured_outputs(
    options: dict[str, Any], outputs: dict[str, Any]
) -> None:
    assert read_format(options).fields == {"structured_outputs": outputs}


def test_an_option_of_none_is_not_given() -> None:
    assert read_format({"regex": None, "choices": None}).fields == {}


@pytest.mark.parametrize(
    ("options", "form", "said"),
    [
        ({"regex": "a", "choices": ["a"]}, None, "regex and choices exclude each other"),
        ({"regex": "a"}, Person, "response_format and regex exclude"),
        ({"regex": "a", "structured_outputs": {}}, None, "beside structured_outputs"),
        ({"choices": "yes"}, None, "no list of texts"),
        ({}, "json", "cannot be read from JSON"),
        ({}, list[Person | Pet], "cannot be read from JSON"),
        ({}, list[Person | Animal], "cannot be read from JSON"),
        ({}, Person("Ada", 31), "a value of Person is no type; give Person itself"),
        ({}, Animal(name="Tom"), "a value of Animal is no type; give Animal itself"),
    ],
)
def test_a_form_that_cannot_be_is_refused(options: Any, form: object, said: str) -> None:
    with pytest.raises(ClientError, match=said) as caught:
        read_format(options, form)
    assert caught.value.code == MISUSED


def test_functions_among_the_tools_are_described() -> None:
    given = {"type": "function", "function": {"name": "other"}}
    tools = read_format({"tools": [get_weather, given]}).fields["tools"]
    assert tools[0]["function"]["name"] == "get_weather"
    assert tools[1] is given


def test_an_answer_is_read_as_its_type() -> None:
    assert reader_of(Person)('{"name":"Ada","age":31}') == Person("Ada", 31)
    assert reader_of(Animal)('{"name":"Tom"}') == Animal(name="Tom")
    assert reader_of(Any)("[1]") == [1]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (list[Animal], '[{"name":"Tom"}]', [Animal(name="Tom")]),
        (dict[str, list[Animal]], '{"a":[{"name":"Tom"}]}', {"a": [Animal(name="Tom")]}),
        (Animal | None, "null", None),
        (Animal | None, '{"name":"Tom"}', Animal(name="Tom")),
    ],
)
def test_a_type_may_have_a_pydantic_model_inside(kind: Any, text: str, value: object) -> None:
    asked = read_format({}, kind)
    schema = asked.fields["response_format"]["json_schema"]["schema"]
    assert schema["$defs"]["Animal"]["additionalProperties"] is False
    check_grammar(Grammar(kind="json_schema", text=msgspec.json.encode(schema).decode()))
    assert asked.read_value is not None
    assert asked.read_value(text) == value
    with pytest.raises(ClientError, match="does not fit"):
        asked.read_value('[{"name":3}]')


@pytest.mark.parametrize("kind", [Person, Animal])
def test_an_answer_of_another_form_is_an_error_that_names_the_type(kind: type) -> None:
    with pytest.raises(ClientError, match=f"does not fit {kind.__name__}") as caught:
        reader_of(kind)('{"name":3}')
    assert caught.value.code == BAD_ANSWER
