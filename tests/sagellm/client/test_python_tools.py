from functools import cache, partial, wraps
from typing import Annotated, Any, Literal

import anyio
import anyio.lowlevel
import msgspec
import pydantic
import pytest

from sagellm.client.python_tools import ToolBox, read_tool, text_of
from sagellm.client.replies import ResponseFunction, ResponseToolCall
from sagellm.client.responses import MISUSED, ClientError


class Place(msgspec.Struct):
    city: str


def get_weather(
    place: Place,
    unit: Literal["c", "f"] = "c",
    days: Annotated[int, msgspec.Meta(ge=1, description="Number of days.")] = 1,
) -> dict[str, Any]:
    """The weather of a place.

    Args:
        place: Where,
            exactly.
        days: Not shown, since the annotation says it.

    Returns:
        Not shown.
    """
    return {"city": place.city, "unit": unit, "days": days}


async def get_time(city: str) -> str:
    """The time in a city."""
    await anyio.lowlevel.checkpoint()
    return f"noon in {city}"


def fail(code: int) -> None:
    """Always fail."""
    raise ValueError(f"no code {code}")


def call(name: str, arguments: str) -> ResponseToolCall:
    return ResponseToolCall(ResponseFunction(name, arguments), "call_1")


def test_a_signature_and_its_docstring_describe_a_tool() -> None:
    function = read_tool(get_weather).plain["function"]
    assert (function["name"], function["description"]) == ("get_weather", "The weather of a place.")
    parameters = function["parameters"]
    assert (parameters["type"], parameters["required"]) == ("object", ["place"])
    assert parameters["additionalProperties"] is False
    assert parameters["properties"]["unit"]["enum"] == ["c", "f"]
    assert parameters["properties"]["days"]["description"] == "Number of days."
    assert parameters["properties"]["place"]["description"] == "Where,\nexactly."


def test_strict_is_asked_where_no_parameter_has_a_default() -> None:
    assert read_tool(get_time).plain["function"]["strict"] is True
    assert "strict" not in read_tool(get_weather).plain["function"]


def test_a_method_is_a_tool_without_its_self() -> None:
    class Shop:
        def price(self, item: str) -> float:
            """The price of an item."""
            return 2.5

    assert list(read_tool(Shop().price).parameters["properties"]) == ["item"]


def traced(function: Any) -> Any:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Greeting:
    """Greets."""

    def __call__(self, name: str) -> str:
        return f"Hello {name}"


@cache
def double(number: int) -> int:
    """Twice a number."""
    return 2 * number


@pytest.mark.parametrize(
    ("function", "name", "description", "properties"),
    [
        (double, "double", "Twice a number.", ["number"]),
        (traced(double), "double", "Twice a number.", ["number"]),
        (traced(get_time), "get_time", "The time in a city.", ["city"]),
        (
            partial(get_weather, unit="f"),
            "get_weather",
            "The weather of a place.",
            ["place", "days"],
        ),
        (traced(partial(traced(fail), 3)), "fail", "Always fail.", []),
        (Greeting(), "Greeting", "Greets.", ["name"]),
    ],
)
def test_a_wrapped_function_is_read_as_the_function_inside(
    function: Any, name: str, description: str, properties: list[str]
) -> None:
    tool = read_tool(function)
    assert (tool.name, tool.description) == (name, description)
    assert list(tool.parameters["properties"]) == properties
    assert read_tool(function, "other").plain["function"]["name"] == "other"


def test_what_a_partial_object_gives_stays() -> None:
    box = ToolBox([partial(get_weather, unit="f"), double, traced(get_time)])
    assert '"unit": "f"' in box.run(call("get_weather", '{"place": {"city": "Rome"}}'))
    assert "unknown field" in box.run(call("get_weather", '{"place": {"city": "R"}, "unit": "c"}'))
    assert box.run(call("double", '{"number": 4}')) == "8"
    assert box.run(call("get_time", '{"city": "Rome"}')) == "noon in Rome"


def bare(city) -> None: ...  # type: ignore[no-untyped-def]


class Endless:
    @property
    def __wrapped__(self) -> "Endless":
        return self

    def __call__(self) -> None: ...


def many(*cities: str) -> None: ...


def odd(value: object) -> None: ...


class Region(msgspec.Struct):
    name: str


def ambiguous(where: Place | Region) -> None: ...


def unknown(value: "Nothing") -> None: ...  # type: ignore[name-defined] # noqa: F821


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (bare, "parameter city has no type"),
        (many, "cannot be given by name"),
        (odd, "type cannot be JSON"),
        (ambiguous, "type cannot be JSON"),
        (unknown, "cannot be read"),
        (lambda: 1, "a tool's name has"),
        (partial(many), "many is no tool"),
        (Endless(), "Endless is no tool: it wraps itself"),
    ],
)
def test_a_function_that_is_no_tool_is_refused(function: Any, said: str) -> None:
    with pytest.raises(ClientError, match=said) as caught:
        read_tool(function)
    assert caught.value.code == MISUSED


def test_arguments_are_converted_and_the_result_is_json() -> None:
    box = ToolBox([get_weather])
    text = box.run(call("get_weather", '{"place":{"city":"Rome"},"days":2}'))
    assert msgspec.json.decode(text) == {"city": "Rome", "unit": "c", "days": 2}


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("get_weather", '{"place":{"city":3}}', "Expected `str`, got `int` - at `$.place.city`"),
        ("get_weather", '{"place":{"city":"a"},"days":0}', ">= 1"),
        ("get_weather", '{"plac":{}}', "unknown field `plac`"),
        ("get_weather", '{"pla', "truncated"),
        ("get_wether", "{}", "did you mean get_weather?"),
        ("fail", '{"code":7}', "ValueError: no code 7"),
    ],
)
def test_a_call_that_fails_says_why_to_the_model(name: str, arguments: str, said: str) -> None:
    text = ToolBox([get_weather, fail]).run(call(name, arguments))
    assert text.startswith("Error: ")
    assert said in text


def test_on_error_chooses_the_text_or_ends_the_loop() -> None:
    texts = iter(["try another", None])
    box = ToolBox([fail], on_error=lambda call, error: next(texts))
    assert box.run(call("fail", '{"code":1}')) == "try another"
    assert box.run(call("fail", '{"code":1}')) == "Error: ValueError: no code 1"

    def give_up(call: ResponseToolCall, error: Exception) -> None:
        raise RuntimeError(call.name) from error

    with pytest.raises(RuntimeError, match="fail"):
        ToolBox([fail], on_error=give_up).run(call("fail", '{"code":1}'))


def test_an_async_function_runs_without_a_loop() -> None:
    assert ToolBox([get_time]).run(call("get_time", '{"city":"Oslo"}')) == "noon in Oslo"


@pytest.mark.parametrize("backend", ["trio", "asyncio"])
def test_in_a_loop_functions_of_both_kinds_run(backend: str) -> None:
    box = ToolBox([get_time, get_weather, fail])

    async def main() -> list[str]:
        calls = (
            call("get_time", '{"city":"Oslo"}'),
            call("get_weather", '{"place":{"city":"Oslo"}}'),
            call("fail", '{"code":1}'),
        )
        return [await box.run_async(each) for each in calls]

    time, weather, failed = anyio.run(main, backend=backend)
    assert (time, failed) == ("noon in Oslo", "Error: ValueError: no code 1")
    assert "Oslo" in weather


def test_two_tools_have_two_names_and_each_is_a_function() -> None:
    with pytest.raises(ClientError, match="one name"):
        ToolBox([fail, fail])
    plain: Any = read_tool(fail).plain
    for given in (plain, None, ""):
        with pytest.raises(ClientError, match="no function to call"):
            ToolBox([given])


def test_a_result_is_text_or_json() -> None:
    class Animal(pydantic.BaseModel):
        name: str

    assert text_of("as it is", "f") == "as it is"
    assert text_of([Place("Rome"), None], "f") == '[{"city": "Rome"}, null]'
    assert text_of(Animal(name="Tom"), "f") == '{"name": "Tom"}'
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ClientError, match="f returned a value that JSON cannot hold"):
        text_of(endless, "f")
    with pytest.raises(ClientError, match="f returned a value that JSON cannot hold"):
        text_of(object(), "f")
