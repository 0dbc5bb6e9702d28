"""Exercises with tools: call the right one, answer from its result, or answer without any."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from exercises import (
    NAMES,
    SUM_ASKS,
    Exercise,
    Message,
    as_json,
    city,
    draw,
    exercise,
    pair,
    word,
    words,
)

TOOL_KINDS = ("tool", "tool_answer", "no_tool")
NO_TOOL_KINDS = ("sum", "reverse", "sort", "count")

WEATHERS = words("sunny cloudy rainy windy snowy foggy clear stormy cold warm hot dry humid mild")
ASPECTS = words(
    "population height price colour age mayor river language currency address owner size weight "
    "capital author title phone status score level"
)
WEATHER_ASKS = (
    "What is the weather in {x}?",
    "What is the weather like in {x}?",
    "How is the weather in {x}?",
    "Tell me the weather in {x}.",
    "What's the weather in {x}?",
    "Weather in {x}?",
)
WEATHER_TEXTS = (
    "{w}, {d} degrees",
    "{d} degrees and {w}",
    "{w} and {d} degrees",
    "{w}, {d}°C",
    "{d}°C, {w}",
)
TIME_ASKS = ("What time is it in {x}?", "Tell me the time in {x}.", "What is the time in {x}?")
ASPECT_ASKS = (
    "What is the {a} of {x}?",
    "Tell me the {a} of {x}.",
    "Find the {a} of {x}.",
    "Look up the {a} of {x}.",
)

Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `aspect`: what it looks up.

    `types`: the JSON types of its arguments. `optional`: arguments that no question fills.
    """

    name: str
    aspect: str
    types: dict[str, str]
    optional: tuple[str, ...] = ()

    @property
    def message(self) -> Message:
        """The tool as the OpenAI API has it."""
        properties = {name: {"type": kind} for name, kind in self.types.items()}
        required = [name for name in self.types if name not in self.optional]
        parameters = {"type": "object", "properties": properties, "required": required}
        function = {"name": self.name, "description": "", "parameters": parameters}
        return {"type": "function", "function": function}


def call_text(name: str, arguments: Arguments) -> str:
    """A call in the form of Hermes and Qwen."""
    return f"<tool_call>\n{as_json({'name': name, 'arguments': arguments})}\n</tool_call>"


def written(message: Message) -> str:
    """The text of a message that calls one function."""
    (call,) = message["tool_calls"]
    return call_text(call["function"]["name"], call["function"]["arguments"])


def _called(ask: str, tool: Tool, arguments: Arguments, result: str, answer: str) -> Exercise:
    """A question, the call it needs, its result, and the answer from the result."""
    call = {"type": "function", "function": {"name": tool.name, "arguments": arguments}}
    history: tuple[Message, ...] = (
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": result},
    )
    return Exercise("tool_answer", ask, answer, history=history)


def _lookup(rng: Random, name: str, aspect: str, subjects: tuple[str, ...]) -> Tool:
    """A tool with one argument; sometimes with an optional one that no question fills."""
    subject = subjects[0] if rng.random() < 0.6 else rng.choice(subjects)
    if rng.random() < 0.9:
        return Tool(name, aspect, {subject: "string"}, (subject,) if rng.random() < 0.1 else ())
    return Tool(name, aspect, {subject: "string", "unit": "string"}, ("unit",))


def _weather_tool(rng: Random) -> Tool:
    name = rng.choice(("get_weather", "get_weather", "get_current_weather", "weather"))
    return _lookup(rng, name, "weather", ("city", "location", "place"))


def _time_tool(rng: Random) -> Tool:
    name = rng.choice(("get_time", "get_time", "get_current_time", "time"))
    return _lookup(rng, name, "time", ("city", "location", "place"))


def _code_tool(rng: Random) -> Tool:
    return _lookup(rng, rng.choice(("get_code", "find_code")), "code", ("name", "person", "user"))


def _aspect_tool(rng: Random) -> Tool:
    aspect = rng.choice(ASPECTS) if rng.random() < 0.6 else word(rng)
    name = rng.choice(("get_", "find_", "look_up_", "")) + aspect
    return _lookup(rng, name, aspect, ("name", "city", "item", "key", word(rng)))


def _sum_tool(rng: Random) -> Tool:
    kind = rng.choice(("integer", "number"))
    first, second = rng.choice((("a", "b"), ("a", "b"), ("x", "y")))
    return Tool(rng.choice(("add", "add_numbers")), "sum", {first: kind, second: kind})


_TOOLS: dict[str, tuple[float, Callable[[Random], Tool]]] = {
    "weather": (3.0, _weather_tool),
    "time": (1.0, _time_tool),
    "code": (1.0, _code_tool),
    "sum": (1.0, _sum_tool),
    "aspect": (3.0, _aspect_tool),
}


def toolbox(rng: Random, num: int, *, with_sum: bool = True) -> list[Tool]:
    """num tools that differ in what they look up."""
    makers = {name: made for name, made in _TOOLS.items() if with_sum or name != "sum"}
    found: dict[str, Tool] = {}
    while len(found) < num:
        (make,) = rng.choices(
            [make for _, make in makers.values()], [share for share, _ in makers.values()]
        )
        tool = make(rng)
        found.setdefault(tool.aspect, tool)
    return list(found.values())


def _subject(rng: Random, tool: Tool) -> str:
    if tool.aspect == "code" or (tool.aspect not in ("weather", "time") and rng.random() < 0.4):
        return rng.choice(NAMES) if rng.random() < 0.6 else word(rng).capitalize()
    return city(rng)


def turn(rng: Random, tool: Tool, *, held_out: bool) -> Exercise:
    """A question for the tool, up to the answer; its subject and its result are on one side."""
    if tool.aspect == "sum":
        return _sum_turn(rng, tool, held_out)
    label = f"{tool.aspect} "
    subject = draw(lambda r: label + _subject(r, tool), rng, held_out).removeprefix(label)
    told = {"weather": _weather, "time": _time}.get(tool.aspect, _aspect)
    result, answer = draw(lambda r: "\n".join(told(r, tool, subject)), rng, held_out).split("\n")
    asks = {"weather": WEATHER_ASKS, "time": TIME_ASKS}.get(tool.aspect, ASPECT_ASKS)
    ask = rng.choice(asks).format(a=tool.aspect, x=subject)
    argument = next(iter(tool.types))
    return _called(ask, tool, {argument: subject}, result, answer)


def _sum_turn(rng: Random, tool: Tool, held_out: bool) -> Exercise:
    a, b = map(int, draw(pair, rng, held_out).split())
    result = rng.choice((str(a + b), as_json({"sum": a + b}), as_json({"result": a + b})))
    ask = rng.choice(SUM_ASKS).format(a=a, b=b)
    return _called(ask, tool, dict(zip(tool.types, (a, b), strict=True)), result, str(a + b))


def _record(rng: Random, tool: Tool, subject: str, values: Arguments) -> str:
    """A result as JSON, with or without what was asked about, in any order of keys."""
    items = list(values.items())
    if rng.random() < 0.6:
        items.insert(0, (next(iter(tool.types)), subject))
    if rng.random() < 0.3:
        rng.shuffle(items)
    return as_json(dict(items))


def _weather(rng: Random, tool: Tool, subject: str) -> tuple[str, str]:
    weather = rng.choice(WEATHERS) if rng.random() < 0.8 else word(rng)
    degrees = rng.randint(-15, 40)
    heat, sky = rng.choice(("degrees", "degrees", "temperature")), "weather"
    if rng.random() < 0.2:
        sky = rng.choice(("condition", "conditions", "forecast"))
    shown = rng.random()
    if shown < 0.6:
        plain = rng.choice(WEATHER_TEXTS)
        values = {sky: weather, heat: degrees}
        answer = f"It is {weather} in {subject}, {degrees} degrees."
    elif shown < 0.85:
        plain, values = "{w}", {sky: weather}
        answer = f"It is {weather} in {subject}."
    else:
        plain, values = "{d} degrees", {heat: degrees}
        answer = f"It is {degrees} degrees in {subject}."
    if rng.random() < 0.3:
        text = plain.format(w=weather, d=degrees)
        return (text.capitalize() if rng.random() < 0.3 else text), answer
    return _record(rng, tool, subject, values), answer


def _time(rng: Random, tool: Tool, subject: str) -> tuple[str, str]:
    time = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    answer = f"It is {time} in {subject}."
    return (time if rng.random() < 0.4 else _record(rng, tool, subject, {"time": time})), answer


def _aspect(rng: Random, tool: Tool, subject: str) -> tuple[str, str]:
    value: int | str = rng.randint(1, 9999) if rng.random() < 0.5 else word(rng)
    answer = f"The {tool.aspect} of {subject} is {value}."
    if rng.random() < 0.4:
        return str(value), answer
    return _record(rng, tool, subject, {tool.aspect: value}), answer


def _messages(tools: list[Tool]) -> tuple[Message, ...]:
    return tuple(tool.message for tool in tools)


def tool_exercise(kind: str, rng: Random, *, held_out: bool) -> Exercise:
    """One exercise of the kind with one or two tools."""
    num = rng.randint(1, 2)
    if kind == "no_tool":
        plain = exercise(rng.choice(NO_TOOL_KINDS), rng, held_out=held_out)
        tools = toolbox(rng, num, with_sum=False)
        return Exercise(kind, plain.prompt, plain.answer, _messages(tools))
    tools = toolbox(rng, num)
    asked = replace(turn(rng, rng.choice(tools), held_out=held_out), tools=_messages(tools))
    if kind == "tool":
        return replace(asked, kind=kind, answer=written(asked.history[0]), history=())
    return asked


def tool_exercises(kind: str, n: int, seed: int, held_out: bool = True) -> list[Exercise]:
    """n exercises of the kind; the same arguments give the same exercises."""
    rng = Random(f"{kind} {seed}")
    return [tool_exercise(kind, rng, held_out=held_out) for _ in range(n)]
