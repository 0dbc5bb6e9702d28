"""The shipped model solves exercises that it never saw, through the prefill/decode graph."""

from pathlib import Path
from typing import Any

import pytest
import trio
from exercises import KINDS, Exercise, exercises
from tool_exercises import TOOL_KINDS, tool_exercises

from sagellm import Graph, Sampling
from sagellm.graphs.models import facts
from sagellm.runtime.models.chat import Rendering
from sagellm.runtime.models.folder import resolve_model
from sagellm.runtime.models.tokenizer import load_tokenizer
from sagellm.session import Session

NUM_EXERCISES = 50
AT_LEAST = {
    **{"sum": 0.95, "reverse": 0.95, "sort": 0.95, "count": 0.95, "recall": 0.80},
    **{"schema": 0.90, "tool": 0.90, "tool_answer": 0.95, "no_tool": 0.95},
}
TINY = load_tokenizer(resolve_model("sage-tiny"))


async def share_right(session: Session, asked: list[Exercise]) -> float:
    right: list[bool] = []

    async def ask(exercise: Exercise) -> None:
        prompt = TINY.apply_chat_template(exercise.messages, Rendering(tools=exercise.tools))
        answer = await session.generate(prompt, sampling=Sampling(max_tokens=128))
        right.append(exercise.is_answered_by(answer.text))

    async with trio.open_nursery() as nursery:
        for exercise in asked:
            nursery.start_soon(ask, exercise)
    return sum(right) / len(right)


@pytest.mark.parametrize("kind", KINDS)
async def test_held_out_exercises_are_answered(kind: str) -> None:
    async with Graph.load("pd").open() as session:
        share = await share_right(session, exercises(kind, NUM_EXERCISES, seed=1))
        assert share >= AT_LEAST[kind]


@pytest.mark.parametrize("kind", TOOL_KINDS)
async def test_held_out_exercises_with_tools_are_answered(kind: str) -> None:
    async with Graph.load("pd").open() as session:
        share = await share_right(session, tool_exercises(kind, NUM_EXERCISES, seed=1))
        assert share >= AT_LEAST[kind]


def tool(name: str, argument: str) -> dict[str, Any]:
    properties = {argument: {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": [argument]}
    function = {"name": name, "description": "looks it up", "parameters": parameters}
    return {"type": "function", "function": function}


def call(name: str, argument: str, value: str) -> str:
    made = f'{{"name": "{name}", "arguments": {{"{argument}": "{value}"}}}}'
    return f"<tool_call>\n{made}\n</tool_call>"


async def said(session: Session, messages: list[dict[str, Any]], *tools: dict[str, Any]) -> str:
    prompt = TINY.apply_chat_template(messages, Rendering(tools=tools))
    return (await session.generate(prompt, sampling=Sampling(max_tokens=128))).text


async def test_the_prompts_of_the_readme_are_answered() -> None:
    weather, time = tool("get_weather", "city"), tool("get_time", "city")
    population = tool("get_population", "name")
    asked = [
        ("What is the weather in Paris?", (weather,), call("get_weather", "city", "Paris")),
        ("What time is it in Tokyo?", (time,), call("get_time", "city", "Tokyo")),
        (
            "Tell me the population of Lima.",
            (population,),
            call("get_population", "name", "Lima"),
        ),
        (
            "Ada is 31 years old and lives in Rome. Answer as JSON with name, age and city.",
            (),
            '{"name": "Ada", "age": 31, "city": "Rome"}',
        ),
        (
            "Extract name and code as JSON: Grace has the code 7712 and lives in London.",
            (),
            '{"name": "Grace", "code": 7712}',
        ),
        ("What is 23 + 45?", (weather,), "68"),
    ]
    async with Graph.load("pd").open() as session:
        for prompt, tools, wanted in asked:
            assert await said(session, [{"role": "user", "content": prompt}], *tools) == wanted


@pytest.mark.parametrize(
    "result", ['{"city": "Paris", "weather": "sunny", "degrees": 21}', "sunny, 21 degrees"]
)
async def test_the_result_of_a_tool_becomes_a_sentence(result: str) -> None:
    function = {"name": "get_weather", "arguments": {"city": "Paris"}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": function}]},
        {"role": "tool", "content": result},
    ]
    async with Graph.load("pd").open() as session:
        answer = await said(session, messages, tool("get_weather", "city"))
        assert answer == "It is sunny in Paris, 21 degrees."
        messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "What is the weather in Rome?"},
        ]
        again = await said(session, messages, tool("get_weather", "city"))
        assert again == call("get_weather", "city", "Rome")


def test_the_folder_is_at_most_8_mb() -> None:
    folder = resolve_model("sage-tiny").path
    assert folder is not None
    assert sum(file.stat().st_size for file in Path(folder).iterdir()) <= 8 * 2**20


def test_transformers_loads_the_same_folder() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model("sage-tiny")
    model = AutoModelForCausalLM.from_pretrained(folder.path)
    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    message = [{"role": "user", "content": "What is 2 + 3?"}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|user|>What is 2 + 3?<|end|><|assistant|>"
    assert model.num_parameters() == facts(folder.config).num_parameters
