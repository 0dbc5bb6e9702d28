"""Answers with drafts equal answers without, for any sampling options, event texts included.

The clock stands still, so that steps cost nothing and drafts always pay.
"""

import pytest
import trio
from engine_driver import Driver, running
from looping_models import make_looping_model
from models_on_the_fly import EOS, VOCAB_SIZE, make_model, random_prompts

from sagellm.runtime.engine.kinds.local import open_engine
from sagellm.runtime.engine.options import EngineOptions
from sagellm.runtime.sampling import Sampling

PROMPTS = random_prompts((3, 20, 45, 90))
NUM_NEW = 60
SAMPLINGS = {
    "greedy": {},
    "warm": {"temperature": 0.8, "top_p": 0.95, "seed": 11},
    "hot": {"temperature": 5.0, "top_k": 40, "min_p": 0.01, "seed": 12},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.4},
    "warm penalties": {"temperature": 0.7, "seed": 3, "frequency_penalty": 0.3},
    "masks": {
        "allowed_token_ids": tuple(range(VOCAB_SIZE // 2)),
        "bad_words_token_ids": tuple((a, b) for a in range(0, 90, 2) for b in range(0, 90, 3)),
    },
    "bias": {"logit_bias": {5: 6.0, 9: 5.0}},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 1},
    "ends": {"ignore_eos": False, "logit_bias": {EOS: 12.0}, "min_tokens": 7},
    "end by chance": {"ignore_eos": False, "temperature": 3.0, "seed": 5},
    "stops anywhere": {"stop_token_ids": tuple(range(0, VOCAB_SIZE, 9)), "min_tokens": 11},
    "stop strings": {"stop": ("a", "e ", "th", "\n", "o", "0"), "min_tokens": 6},
    "stop strings kept": {"stop": ("s", "1", "x"), "include_stop_str_in_output": True},
}


@pytest.fixture(scope="module")
def looping(tmp_path_factory):
    return make_looping_model(tmp_path_factory.mktemp("looping"))


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    return make_model("qwen3", tmp_path_factory.mktemp("qwen3"))


def open_on(folder, **options):
    options = {"model": str(folder), "deterministic": True, "max_model_len": 256, **options}
    return open_engine(EngineOptions(**options), name="e")


async def answers(engine, fields, *, num_choices=1):
    """Everything that a client would see of all prompts, served together, joined over events."""
    sampling = Sampling(**{"max_tokens": NUM_NEW, "ignore_eos": True, **fields})
    async with running(engine) as [driver]:
        for index, prompt in enumerate(PROMPTS):
            for choice in range(num_choices):
                await driver.submit(str(index), prompt, choice=choice, sampling=sampling)
        await driver.all_done()
    return {key: seen(reply) for key, reply in driver.replies.items()}


def seen(reply):
    logprobs = [logprob for event in reply.events for logprob in event.logprobs]
    prompt = [logprob for event in reply.events for logprob in event.prompt_logprobs]
    last = reply.last
    return reply.token_ids, reply.text, last.finish_reason, last.stop_reason, logprobs, prompt


@pytest.mark.parametrize("fields", SAMPLINGS.values(), ids=SAMPLINGS)
async def test_from_its_own_tokens(looping, fields, mock_clock):
    engine = open_on(looping, speculation="ngram")
    assert await answers(engine, fields) == await answers(open_on(looping), fields)


@pytest.mark.parametrize("fields", SAMPLINGS.values(), ids=SAMPLINGS)
async def test_from_a_draft_model(random_model, fields, mock_clock):
    engine = open_on(random_model, speculation="draft", draft_model=str(random_model))
    assert await answers(engine, fields) == await answers(open_on(random_model), fields)
    assert engine.load.drafts.num_draft_tokens > 0


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7])
async def test_max_tokens_cut_drafts(looping, length, mock_clock):
    engine = open_on(looping, speculation="draft", draft_model=str(looping))
    found = await answers(engine, {"max_tokens": length})
    assert found == await answers(open_on(looping), {"max_tokens": length})
    assert {len(reply[0]) for reply in found.values()} == {length}


async def test_the_context_limit_cuts_drafts(looping, mock_clock):
    engine = open_on(looping, max_model_len=112, speculation="draft", draft_model=str(looping))
    found = await answers(engine, {"max_tokens": 200})
    assert [len(reply[0]) for reply in found.values()] == [112 - len(prompt) for prompt in PROMPTS]


async def test_choices_that_share_their_prompt(random_model, mock_clock):
    fields = {"temperature": 1.0, "seed": 4, "max_tokens": 30}
    engine = open_on(random_model, speculation="draft", draft_model=str(random_model))
    found = await answers(engine, fields, num_choices=3)
    assert found == await answers(open_on(random_model), fields, num_choices=3)
    assert len({tuple(reply[0]) for reply in found.values()}) == len(found)


async def test_an_answer_that_repeats_takes_fewer_steps(looping, mock_clock):
    plain, drafting = open_on(looping), open_on(looping, speculation="ngram")
    longer = {"max_tokens": 2 * NUM_NEW}
    assert await answers(drafting, longer) == await answers(plain, longer)
    assert drafting.load.num_steps < plain.load.num_steps / 2
    counts = drafting.load.drafts
    assert counts.num_accepted_tokens > 0.8 * counts.num_draft_tokens
    assert counts.accepted_at[0] >= counts.accepted_at[3] > 0


async def test_one_step_gives_one_event(looping, mock_clock):
    engine = open_on(looping, speculation="ngram", num_draft_tokens=6)
    async with running(engine) as [driver]:
        reply = await driver.submit("r", PROMPTS[1], max_tokens=NUM_NEW)
        await reply.done.wait()
    assert len(reply.events) == engine.load.num_steps
    assert max(len(event.token_ids) for event in reply.events) == 7


async def test_drafts_that_are_never_right_become_rare(looping, random_model, mock_clock):
    engine = open_on(random_model, speculation="draft", draft_model=str(looping))
    found = await answers(engine, {"max_tokens": 128})
    assert found == await answers(open_on(random_model), {"max_tokens": 128})
    assert 0 < engine.load.drafts.num_draft_tokens < 0.12 * 4 * 128


@pytest.mark.parametrize("kind", ["ngram", "draft"])
async def test_cancelled_while_drafts_are_computed(looping, kind, mock_clock):
    drafts = {"draft_model": str(looping)} if kind == "draft" else {}
    engine = open_on(looping, speculation=kind, **drafts)
    async with running(engine) as [driver]:
        replies = [await driver.submit(str(i), PROMPTS[i], max_tokens=150) for i in range(4)]
        for reply in replies:
            seen_before = engine.load.num_steps
            while engine.load.num_steps < seen_before + 3:
                await trio.lowlevel.checkpoint()
            engine.cancel(str(replies.index(reply)), 0, 0)
        await driver.all_done()
    assert "cancelled" in {reply.last.finish_reason for reply in replies}
    assert kind == "ngram" or engine._resources.speculation.drafter.pool.num_leased == 0


async def test_a_full_pool_goes_without_drafts(looping, mock_clock):
    """A prompt of 90 tokens and its answer fill the 8 blocks, and leave no block for drafts."""
    engine = open_on(looping, num_blocks=8, max_model_len=128, speculation="ngram")
    found = await answers(engine, {"max_tokens": 38})
    assert found == await answers(open_on(looping), {"max_tokens": 38})


async def test_a_drafter_that_fails_costs_no_answer(looping, mock_clock):
    engine = open_on(looping, speculation="draft", draft_model=str(looping))

    async def fail(wanted):
        raise RuntimeError("no")

    engine._resources.speculation.drafter.draft = fail
    found = await answers(engine, {})
    assert found == await answers(open_on(looping), {})
    assert engine.load.drafts.num_drafts == 0


async def test_an_engine_that_ends_midway_keeps_no_draft_block(looping, mock_clock):
    engine = open_on(looping, speculation="draft", draft_model=str(looping))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        driver = Driver(engine)
        nursery.start_soon(driver.read)
        await driver.submit("r", PROMPTS[0], max_tokens=200)
        while engine.load.drafts.num_drafts < 3:
            await trio.lowlevel.checkpoint()
        assert engine._resources.speculation.drafter.pool.num_leased > 0
        nursery.cancel_scope.cancel()
    assert engine.pool.num_leased == engine._resources.speculation.drafter.pool.num_leased == 0
