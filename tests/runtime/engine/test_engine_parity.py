"""Greedy tokens of the engine against transformers, on random models of every family."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from detached import installed
from engine_driver import hand_over, running
from models_on_the_fly import (
    FAMILIES,
    Reference,
    make_model,
    random_prompts,
    reference,
    scarce_blocks,
)

from sagellm.runtime.engine.kinds.local import open_engine
from sagellm.runtime.engine.options import EngineOptions

LENGTHS = (1, 2, 5, 17, 40, 90, 180, 300)
NUM_NEW = 64
EXAMS = [*((family, "cpu") for family in FAMILIES), ("qwen3", "detached")]


@dataclass(frozen=True)
class Exam:
    folder: Path
    device: str
    prompts: list[tuple[int, ...]]
    right: Reference
    scarce: dict[str, int]


@pytest.fixture(scope="module", params=EXAMS, ids="-".join)
def exam(request, tmp_path_factory):
    family, device = request.param
    folder = make_model(family, tmp_path_factory.mktemp(family))
    prompts = random_prompts(LENGTHS)
    with installed():
        yield Exam(
            folder, device, prompts, reference(folder, prompts, NUM_NEW), scarce_blocks(family)
        )


def open_exact(exam, replica=0, **options):
    options = {"model": str(exam.folder), "deterministic": True, "max_model_len": 512, **options}
    return open_engine(EngineOptions(device=exam.device, **options), name="e", replica=replica)


async def answer_together(engine, exam):
    async with running(engine) as [driver]:
        for index, prompt in enumerate(exam.prompts):
            await driver.submit(str(index), prompt, max_tokens=NUM_NEW)
        await driver.all_done()
    return [reply.token_ids for reply in driver.replies.values()]


def test_reference_is_worth_comparing(exam):
    exam.right.check()


async def test_alone(exam):
    async with running(open_exact(exam)) as [driver]:
        for index, prompt in enumerate(exam.prompts):
            reply = await driver.submit(str(index), prompt, max_tokens=NUM_NEW)
            await reply.done.wait()
            assert reply.token_ids == exam.right.tokens[index]


@pytest.mark.parametrize("budget", [7, 64, 2048])
async def test_eight_at_once_in_chunks(exam, budget):
    engine = open_exact(exam, max_num_batched_tokens=budget)
    assert await answer_together(engine, exam) == exam.right.tokens


@pytest.mark.parametrize("exam", [("qwen3", "cpu")], indirect=True, ids="-".join)
@pytest.mark.parametrize("threads", [2, 3])
async def test_eight_at_once_on_threads(exam, threads):
    engine = open_exact(exam, threads=threads)
    assert await answer_together(engine, exam) == exam.right.tokens


async def test_capped_chunks_and_small_blocks(exam):
    engine = open_exact(exam, prefill_chunk=33, block_size=4)
    assert await answer_together(engine, exam) == exam.right.tokens


async def test_joining_and_leaving(exam):
    async with running(open_exact(exam, max_num_seqs=3)) as [driver]:
        for index, prompt in enumerate(exam.prompts):
            count = NUM_NEW if index % 2 else 20
            reply = await driver.submit(str(index), prompt, max_tokens=count)
            if index % 3 == 0:
                await reply.done.wait()
        await driver.all_done()
    for reply, right in zip(driver.replies.values(), exam.right.tokens, strict=True):
        assert reply.token_ids == right[: len(reply.token_ids)]


async def test_after_preemption(exam):
    engine = open_exact(exam, **exam.scarce)
    assert await answer_together(engine, exam) == exam.right.tokens
    assert engine.load.num_preemptions > 0


async def test_split_between_two_engines(exam):
    source, target = open_exact(exam), open_exact(exam, replica=1)
    async with running(source, target) as [prefill, decode]:
        for index, prompt in enumerate(exam.prompts):
            first, rest = await hand_over(prefill, decode, str(index), prompt, max_tokens=NUM_NEW)
            assert first.token_ids + rest.token_ids == exam.right.tokens[index]


async def test_resumed_from_emitted_tokens(exam):
    async with running(open_exact(exam)) as [driver]:
        right, prompt = exam.right.tokens[4], exam.prompts[4]
        emitted = tuple(right[:30])
        reply = await driver.submit("r", prompt, max_tokens=NUM_NEW, emitted_token_ids=emitted)
        await reply.done.wait()
        assert reply.token_ids == right[30:]
        assert reply.events[0].position == 30
