"""The shipped model solves exercises that it never saw, through the prefill/decode graph."""

from pathlib import Path

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
