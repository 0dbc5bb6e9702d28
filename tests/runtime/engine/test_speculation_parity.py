"""Greedy tokens with drafts against transformers, on random models of every family."""

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
EXAMS = [*((family, "cpu") for family in FAMILIES), ("llama", "detached")]


@dataclass(frozen=True)
class Exam:
    folder: Path
    device: str
    other: Path  # of the same shape and vocabulary, with other weights
    prompts: list[tuple[int, ...]]
    right: Reference
    scarce: dict[str, int]


@pytest.fixture(scope="module", params=EXAMS, ids="-".join)
def exam(request, tmp_path_factory):
    family, device = request.param
    folder = make_model(family, tmp_path_factory.mktemp(family))
    other = make_model(family, tmp_path_factory.mktemp("other"), seed=1)
    prompts = random_prompts(LENGTHS)
    right = reference(folder, prompts, NUM_NEW)
    right.check()
    with installed():
        yield Exam(folder, device, other, prompts, right, scarce_blocks(family))


@pytest.fixture(params=["ngram", "itself", "other"])
def drafts(request, exam):
    if request.param == "ngram":
        return {"speculation": "ngram"}
    draft = exam.folder if request.param == "itself" else exam.other
    return {"speculation": "draft", "draft_model": str(draft)}


def open_exact(exam, **options):
    options = {"model": str(exam.folder), "deterministic": True, "max_model_len": 512, **options}
    return open_engine(EngineOptions(device=exam.device, **options), name="e")


async def answer_together(engine, exam):
    async with running(engine) as [driver]:
        for index, prompt in enumerate(exam.prompts):
            await driver.submit(str(index), prompt, max_tokens=NUM_NEW)
        await driver.all_done()
    check_counts(engine)
    return [reply.token_ids for reply in driver.replies.values()]


def check_counts(engine):
    """Check that the draft model holds no block either."""
    counts = engine.load.drafts
    assert counts.num_accepted_tokens <= counts.num_draft_tokens
    pool = getattr(engine._resources.speculation.drafter, "pool", None)
    if pool is not None:
        pool.check()
        assert pool.num_leased == 0


@pytest.mark.parametrize("budget", [7, 64, 2048])
async def test_eight_at_once_in_chunks(exam, drafts, budget):
    engine = open_exact(exam, max_num_batched_tokens=budget, **drafts)
    assert await answer_together(engine, exam) == exam.right.tokens


async def test_after_preemption(exam, drafts):
    engine = open_exact(exam, **exam.scarce, **drafts)
    assert await answer_together(engine, exam) == exam.right.tokens
    assert engine.load.num_preemptions > 0


async def test_small_blocks_and_joining_and_leaving(exam, drafts):
    engine = open_exact(exam, max_num_seqs=3, block_size=4, **drafts)
    assert await answer_together(engine, exam) == exam.right.tokens


async def test_split_between_two_engines(exam, drafts):
    source, target = open_exact(exam), open_exact(exam, **drafts)
    async with running(source, target) as [prefill, decode]:
        for index, prompt in enumerate(exam.prompts):
            first, rest = await hand_over(prefill, decode, str(index), prompt, max_tokens=NUM_NEW)
            assert first.token_ids + rest.token_ids == exam.right.tokens[index]
    check_counts(target)


async def test_resumed_from_emitted_tokens(exam, drafts):
    engine = open_exact(exam, **drafts)
    async with running(engine) as [driver]:
        right, prompt = exam.right.tokens[4], exam.prompts[4]
        emitted = tuple(right[:30])
        reply = await driver.submit("r", prompt, max_tokens=NUM_NEW, emitted_token_ids=emitted)
        await reply.done.wait()
        assert reply.token_ids == right[30:]
    check_counts(engine)


async def test_the_model_itself_is_always_right(exam, mock_clock):
    """With a clock that stands still, steps cost nothing: every decode drafts all that it may."""
    drafts = {"speculation": "draft", "draft_model": str(exam.folder)}
    engine = open_exact(exam, max_num_batched_tokens=2048, **drafts)
    assert await answer_together(engine, exam) == exam.right.tokens
    counts = engine.load.drafts
    assert counts.num_accepted_tokens == counts.num_draft_tokens > 0.7 * 8 * NUM_NEW
    assert engine.load.num_steps < NUM_NEW / 3
