"""Logprobs of prompt tokens against transformers, in every way of computing the prompt."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from engine_driver import hand_over, running
from models_on_the_fly import make_model, random_prompts
from transformers import AutoModelForCausalLM

from sagellm import Graph
from sagellm.backends.cpu import program
from sagellm.runtime.engine.batch import SCORED_ROWS
from sagellm.runtime.engine.kinds.local import open_engine
from sagellm.runtime.engine.options import EngineOptions
from sagellm.runtime.messages import SequenceState
from sagellm.runtime.port import EngineRefusal
from sagellm.runtime.sampling import Sampling

LENGTHS = (1, 2, 17, 64, 65, 150, 180)
PROMPTS = random_prompts(LENGTHS)
TOP = 3
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exam:
    folder: Path
    logprobs: list[torch.Tensor]  # [tokens, vocab]: row i is of token i + 1

    def check(self, prompt, found):
        """Logprobs of every token but the first, and of the most likely tokens at its position."""
        right = self.logprobs[PROMPTS.index(prompt)]
        assert [scored.token_id for scored in found] == list(prompt[1:])
        for position, scored in enumerate(found):
            row = right[position]
            assert scored.logprob == pytest.approx(float(row[scored.token_id]), abs=TOLERANCE)
            best = row.topk(TOP)
            assert [token for token, _ in scored.top] == best.indices.tolist()
            values = [value for _, value in scored.top]
            assert values == pytest.approx(best.values.tolist(), abs=TOLERANCE)


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    # Weights so small that logprobs are some units: float32 is exact to the tolerance then.
    folder = make_model("qwen3", tmp_path_factory.mktemp("qwen3"), initializer_range=0.05)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logprobs = [model(torch.tensor([p])).logits[0].log_softmax(-1) for p in PROMPTS]
    return Exam(folder, logprobs)


def open_on(exam, **options):
    options = {"model": str(exam.folder), "max_model_len": 256, **options}
    return open_engine(EngineOptions(**options), name="e")


def scored(max_tokens=3, **fields):
    return Sampling(max_tokens=max_tokens, prompt_logprobs=TOP, ignore_eos=True, seed=1, **fields)


def given(reply):
    """The prompt logprobs of the first event. No other event may have any."""
    assert not any(event.prompt_logprobs for event in reply.events[1:])
    return reply.events[0].prompt_logprobs


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 7}, {"prefill_chunk": 33}])
async def test_together_and_in_chunks(exam, options):
    async with running(open_on(exam, **options)) as [driver]:
        for index, prompt in enumerate(PROMPTS):
            await driver.submit(str(index), prompt, sampling=scored())
            await driver.submit(f"plain{index}", prompt, max_tokens=3)
        await driver.all_done()
    for index, prompt in enumerate(PROMPTS):
        exam.check(prompt, given(driver.replies[str(index), 0]))
        assert given(driver.replies[f"plain{index}", 0]) == ()


async def test_tokens_are_the_same_with_and_without(exam):
    async with running(open_on(exam, deterministic=True)) as [driver]:
        for index, prompt in enumerate(PROMPTS):
            with_scores = await driver.submit(f"a{index}", prompt, sampling=scored(20))
            without = await driver.submit(f"b{index}", prompt, max_tokens=20)
            await driver.all_done()
            assert with_scores.token_ids == without.token_ids


async def test_every_choice_has_them(exam):
    async with running(open_on(exam)) as [driver]:
        for choice in range(3):
            await driver.submit("r", PROMPTS[5], choice=choice, sampling=scored())
        await driver.all_done()
    assert len(driver.replies) == 3
    for reply in driver.replies.values():
        exam.check(PROMPTS[5], given(reply))


@pytest.fixture
def rows(monkeypatch):
    """The number of rows of logits that each step scored."""
    counts = []
    score = program.score

    def counting(logits, scoring):
        counts.append(len(logits))
        return score(logits, scoring)

    monkeypatch.setattr(program, "score", counting)
    return counts


async def test_rows_of_logits_are_few_and_each_is_computed_once(exam, rows):
    async with running(open_on(exam)) as [driver]:
        for index, prompt in enumerate(PROMPTS):
            await driver.submit(str(index), prompt, sampling=scored())
        await driver.all_done()
    assert max(rows) <= SCORED_ROWS == 64
    assert sum(rows) == sum(length - 1 for length in LENGTHS)


async def test_preempted_prompts_are_scored_once(exam, rows):
    engine = open_on(exam, num_blocks=16, max_num_batched_tokens=32)
    async with running(engine) as [driver]:
        for index in (2, 3, 4, 5):
            await driver.submit(str(index), PROMPTS[index], sampling=scored(40))
        await driver.all_done()
    assert engine.load.num_preemptions > 0
    for index in (2, 3, 4, 5):
        exam.check(PROMPTS[index], given(driver.replies[str(index), 0]))
    assert sum(rows) == sum(LENGTHS[index] - 1 for index in (2, 3, 4, 5))


async def test_a_split_sequence_gives_them_with_its_first_token(exam):
    async with running(open_on(exam), open_on(exam)) as [prefill, decode]:
        first, rest = await hand_over(prefill, decode, "r", PROMPTS[5], sampling=scored(8))
    exam.check(PROMPTS[5], given(first))
    assert not any(event.prompt_logprobs for event in rest.events)


async def test_blocks_from_elsewhere_cannot_say_how_likely_the_prompt_was(exam):
    async with running(open_on(exam)) as [driver]:
        first = await driver.submit("r", PROMPTS[5], hold_kv=True, max_tokens=4)
        await first.done.wait()
        with pytest.raises(EngineRefusal, match="prompt_logprobs need the whole prompt"):
            await driver.engine.submit(_adopting(first.lease))
        driver.engine.cancel("r", 0, 0)


def _adopting(lease):
    return SequenceState(
        owner="test",
        request_id="r",
        prompt_token_ids=(*PROMPTS[5], 7),
        sampling=scored(),
        lease=lease,
    )


@pytest.mark.parametrize("graph", ["joint", "pd"])
async def test_through_a_graph(exam, graph):
    loaded = Graph.load(graph)
    async with loaded.open(model=str(exam.folder)) as session:
        for prompt in PROMPTS[2:6]:
            answers = await session.generate_all(prompt, sampling=scored(n=2, temperature=1.0))
            assert len(answers) == 2
            for answer in answers:
                exam.check(prompt, answer.prompt_logprobs)
        await session.idle()
        session.executor.core.ledger.check()
        pools = session.statistics().engines.values()
        assert all(load.num_leased_blocks == 0 for pool in pools for load in pool)
