"""Answers of the torch engine as its callers see them: seeds, ends, text, sharing, threads."""

import random
import threading

import pytest
import trio
from engine_driver import hand_over, put_runner, running
from models_on_the_fly import EOS, byte_tokenizer, make_model, random_prompts, reference

from sagellm.runtime.engine.kinds.local import open_engine
from sagellm.runtime.engine.options import EngineOptions
from sagellm.runtime.sampling import Sampling

PROMPTS = random_prompts((3, 20, 45, 90))
WARM = {"temperature": 5.0, "top_k": 40, "top_p": 0.95, "seed": 11, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def engine(folder):
    return open_on(folder)


def open_on(folder, **options):
    options = {"model": str(folder), "deterministic": True, "max_model_len": 256, **options}
    return open_engine(EngineOptions(**options), name="e")


async def answer(engine, prompt, request_id="r", **sampling):
    async with running(engine) as [driver]:
        reply = await driver.submit(request_id, prompt, sampling=Sampling(**sampling))
        await reply.done.wait()
        return reply


async def warm_answers(engine):
    async with running(engine) as [driver]:
        for index, prompt in enumerate(PROMPTS):
            sampling = Sampling(max_tokens=40, **WARM)
            await driver.submit(str(index), prompt, sampling=sampling)
        await driver.all_done()
        return [reply.token_ids for reply in driver.replies.values()]


async def test_seeded_tokens_are_the_same_alone_batched_preempted_and_split(folder):
    batched = await warm_answers(open_on(folder))
    crowded = open_on(folder, num_blocks=16, max_num_batched_tokens=32)
    assert await warm_answers(crowded) == batched
    assert crowded.load.num_preemptions > 0
    alone = await answer(open_on(folder), PROMPTS[1], max_tokens=40, **WARM)
    assert alone.token_ids == batched[1]
    async with running(open_on(folder), open_on(folder)) as drivers:
        sampling = Sampling(max_tokens=40, **WARM)
        first, rest = await hand_over(*drivers, "s", PROMPTS[2], sampling=sampling)
    assert first.token_ids + rest.token_ids == batched[2]
    assert len({tuple(tokens) for tokens in batched}) == len(batched)


async def test_split_into_a_crowded_engine_gives_the_same_tokens(folder):
    whole = await warm_answers(open_on(folder))
    crowded = open_on(folder, num_blocks=16)
    async with running(open_on(folder), crowded) as drivers:

        async def serve(index):
            sampling = Sampling(max_tokens=40, **WARM)
            parts = await hand_over(*drivers, str(index), PROMPTS[index], sampling=sampling)
            assert parts[0].token_ids + parts[1].token_ids == whole[index]

        async with trio.open_nursery() as nursery:
            for index in range(len(PROMPTS)):
                nursery.start_soon(serve, index)
    assert crowded.load.num_preemptions > 0


async def test_choices_share_blocks_and_differ(engine):
    async with running(engine) as [driver]:
        for choice in range(3):
            sampling = Sampling(max_tokens=20, **WARM)
            await driver.submit("r", PROMPTS[3], choice=choice, sampling=sampling)
        await driver.all_done()
        answers = [reply.token_ids for reply in driver.replies.values()]
        # 90 + 20 tokens are 7 blocks: 5 shared full ones of the prompt, 2 own each
        assert engine.load.peak_leased_blocks == 5 + 3 * 2
    assert len({tuple(tokens) for tokens in answers}) == 3


async def test_a_choice_that_shares_is_the_choice_alone(folder):
    async def choice_one(choices):
        async with running(open_on(folder)) as [driver]:
            for choice in choices:
                sampling = Sampling(max_tokens=20, **WARM)
                await driver.submit("r", PROMPTS[3], choice=choice, sampling=sampling)
            await driver.all_done()
            return driver.replies["r", 1].token_ids

    assert await choice_one([0, 1]) == await choice_one([1])


async def test_end_of_text_stops_without_text_or_reason(engine):
    reply = await answer(engine, PROMPTS[0], logit_bias={EOS: 100.0})
    assert reply.token_ids == [EOS]
    assert (reply.text, reply.last.finish_reason, reply.last.stop_reason) == ("", "stop", None)


async def test_ignore_eos_goes_on(engine):
    bias = {EOS: 100.0}
    reply = await answer(engine, PROMPTS[0], logit_bias=bias, ignore_eos=True, max_tokens=4)
    assert reply.token_ids == [EOS] * 4
    assert reply.last.finish_reason == "length"


async def test_min_tokens_delay_the_end(engine):
    reply = await answer(engine, PROMPTS[0], logit_bias={EOS: 100.0}, min_tokens=3)
    assert len(reply.token_ids) == 4
    assert reply.token_ids.index(EOS) == 3


async def test_a_stop_token_is_named(engine, folder):
    [right] = reference(folder, PROMPTS[1:2], 8).tokens
    reply = await answer(engine, PROMPTS[1], stop_token_ids=(right[4],))
    assert reply.token_ids == right[: right.index(right[4]) + 1]
    assert (reply.last.finish_reason, reply.last.stop_reason) == ("stop", right[4])
    assert reply.text == byte_tokenizer().decode(reply.token_ids[:-1])


@pytest.mark.parametrize(("keep", "text"), [(False, ""), (True, "zzz")])
async def test_a_stop_string_over_three_tokens(engine, keep, text):
    [token] = byte_tokenizer().encode("z").ids
    reply = await answer(
        engine,
        PROMPTS[0],
        logit_bias={token: 100.0},
        stop=("zzz",),
        include_stop_str_in_output=keep,
    )
    assert reply.token_ids == [token] * 3
    assert (reply.text, reply.last.finish_reason, reply.last.stop_reason) == (text, "stop", "zzz")


async def test_streamed_text_is_the_whole_text(engine):
    reply = await answer(engine, PROMPTS[2], max_tokens=60, **WARM)
    assert reply.text == byte_tokenizer().decode(reply.token_ids)


async def test_resumed_text_goes_on_where_it_ended(folder):
    whole = await answer(open_on(folder), PROMPTS[2], max_tokens=60, **WARM)
    async with running(open_on(folder)) as [driver]:
        reply = await driver.submit(
            "r",
            PROMPTS[2],
            sampling=Sampling(max_tokens=60, **WARM),
            emitted_token_ids=tuple(whole.token_ids[:25]),
        )
        await reply.done.wait()
    before = "".join(event.text for event in whole.events[:25])
    assert reply.token_ids == whole.token_ids[25:]
    assert before + reply.text == whole.text


async def test_logprobs_come_with_each_token(engine):
    reply = await answer(engine, PROMPTS[1], max_tokens=5, logprobs=3)
    assert all(len(event.logprobs[0].top) == 3 for event in reply.events)
    assert all(event.logprobs[0].logprob <= 0 for event in reply.events)
    assert [event.logprobs[0].top[0][0] for event in reply.events] == reply.token_ids


async def test_cancelling_while_a_step_computes(engine):
    async with running(engine) as [driver]:
        replies = [
            await driver.submit(str(index), PROMPTS[index], max_tokens=200) for index in (0, 1)
        ]
        while engine.load.num_steps < 5:
            await trio.lowlevel.checkpoint()
        driver.engine.cancel("0", 0, 0)
        await replies[0].done.wait()
        driver.engine.cancel("1", 0, 0)
        await driver.all_done()
    assert {reply.last.finish_reason for reply in replies} == {"cancelled"}


async def test_no_thread_survives_a_cancelled_engine(engine):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        await trio.testing.wait_all_tasks_blocked()
        names = [thread.name for thread in threading.enumerate()]
        nursery.cancel_scope.cancel()
    assert "sagellm-engine" in names
    assert "sagellm-engine" not in [thread.name for thread in threading.enumerate()]


async def test_engines_of_one_model_share_its_program(folder):
    first, second = open_on(folder), open_on(folder, num_blocks=20)
    programs = [engine._resources.runner.program for engine in (first, second)]
    assert programs[0] is programs[1]
    other = open_on(folder, block_size=8)
    assert other._resources.runner.program is not programs[0]


class Launches:
    """Computes with `runner`. `starting`: the requests whose first token each launch samples."""

    def __init__(self, runner):
        self.runner = runner
        self.async_scheduling, self.open, self.close = (
            runner.async_scheduling,
            runner.open,
            runner.close,
        )
        self.starting = []

    def launch(self, batch, after=None):
        prefills = batch.sampling[batch.num_decodes :]
        self.starting.append({sequence.state.request_id for sequence in prefills})
        return self.runner.launch(batch, after)


async def test_a_short_prompt_after_a_long_one_waits_two_steps(folder):
    """For the step that computes, and for the next step, which may have begun."""
    long, short = random_prompts((200, 4))
    engine = open_on(folder, max_num_batched_tokens=16)
    launches = Launches(engine._resources.runner)
    put_runner(engine, launches)
    async with running(engine) as [driver]:
        await driver.submit("long", long, max_tokens=2)
        while driver.engine.load.num_steps < 2:
            await trio.lowlevel.checkpoint()
        num_launches = len(launches.starting)  # the last of them computes, or is next to
        await driver.submit("short", short, max_tokens=2)
        await driver.all_done()
    assert {"short"} in launches.starting[num_launches : num_launches + 2]
    assert {"long"} in launches.starting[num_launches + 2 :]


@pytest.mark.parametrize("seed", range(2))
async def test_cancelling_two_computing_engines_anywhere_frees_every_block(folder, seed):
    chance = random.Random(seed)
    small = {"num_blocks": 16, "max_num_batched_tokens": 32}
    async with running(open_on(folder, **small), open_on(folder, **small)) as drivers:

        async def serve(index):
            with trio.move_on_after(chance.random() * 0.5):
                await hand_over(*drivers, str(index), PROMPTS[index % 4], max_tokens=30)
            for driver in drivers:
                driver.engine.cancel(str(index), 0, 0)

        async with trio.open_nursery() as nursery:
            for index in range(20):
                nursery.start_soon(serve, index)
        while any(driver.engine.pool.num_leased for driver in drivers):  # steps under way
            await trio.lowlevel.checkpoint()
