"""Whole graphs over the CPU engine: latency under load, cancelling, answers of sage-tiny."""

import random
from typing import Any

import pytest
import trio
import trio.testing
from models_on_the_fly import make_model, random_prompts

from sagellm import Graph, Sampling
from sagellm.session import Session

SHORT = Sampling(max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> str:
    """A model whose step takes milliseconds, so that a wait for a whole prompt would be seen."""
    return str(
        make_model("llama", tmp_path_factory.mktemp("llama"), hidden_size=256,
                   intermediate_size=1024, num_hidden_layers=6)
    )  # fmt: skip


async def check_at_rest(session: Session) -> None:
    await session.idle()
    session.executor.core.ledger.check()
    for pool in session.statistics().engines.values():
        for load in pool:
            assert load.num_leased_blocks == 0
            assert load.num_free_blocks + load.num_cached_blocks == load.num_blocks


async def ttft_s(session: Session, prompt: Any) -> float:
    """Seconds to the first of 4 tokens."""
    asked = trio.current_time()
    async with session.stream(prompt, sampling=SHORT) as stream:
        await stream.__anext__()
        first = trio.current_time() - asked
        async for _ in stream:
            pass
    return first


async def step_s(session: Session) -> float:
    """Seconds of one full step: a 256-token prompt in chunks of 64 takes four steps."""
    asked = trio.current_time()
    await session.generate([1] * 256, sampling=Sampling(max_tokens=1, ignore_eos=True))
    return (trio.current_time() - asked) / 4


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["a prompt of 700 tokens", "an answer of 700 tokens"])
async def test_a_short_request_does_not_wait_for_a_long_one(kind: str, folder: str) -> None:
    (short,) = random_prompts([4])
    long_prompt, long_answer = ([1] * 700, 4) if "prompt" in kind else ([1] * 8, 700)
    limits = {"g.max_num_batched_tokens": 64, "g.max_model_len": 1024, "g.prefix_caching": False}
    async with Graph.load("joint").open(set=limits, model=folder) as session:
        for _ in range(2):
            await ttft_s(session, short)
        # The best of five of each: what else runs on the machine only ever adds.
        alone = min([await ttft_s(session, short) for _ in range(5)])
        one_step = min([await step_s(session) for _ in range(5)])
        behind = []
        for _ in range(5):
            sampling = Sampling(max_tokens=long_answer, ignore_eos=True)
            async with session.stream(long_prompt, sampling=sampling) as long:
                await trio.testing.wait_all_tasks_blocked()  # its first step runs
                behind.append(await ttft_s(session, short))
                assert long._num_open  # still running
        assert min(behind) <= 2 * alone + one_step
        await session.executor.idle()
        await check_at_rest(session)


@pytest.mark.parametrize("graph", ["pd", "pd_many"])
async def test_cancelled_at_random_points(graph: str, folder: str) -> None:
    draw = random.Random(graph)
    limits = {f"{e}.max_num_batched_tokens": 64 for e in "pd"} | {
        f"{e}.max_model_len": 1024 for e in "pd"
    }
    async with Graph.load(graph).open(set=limits, model=folder) as session:

        async def asked_and_cancelled(number: int) -> None:
            prompt = [number, *[1] * draw.randint(0, 199)]  # none is a prefix of another
            with trio.move_on_after(draw.uniform(0, 0.5)):
                await session.generate(prompt, sampling=Sampling(max_tokens=20, ignore_eos=True))

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(asked_and_cancelled, number)
                await trio.sleep(draw.uniform(0, 0.02))
        await session.executor.idle()
        assert session.executor.core.ledger.ended["cancelled"] > 10
        await check_at_rest(session)


async def test_an_answer_ends_at_the_context_limit(folder: str) -> None:
    async with Graph.load("joint").open(set={"g.max_model_len": 64}, model=folder) as session:
        sampling = Sampling(max_tokens=500, ignore_eos=True)
        answer = await session.generate([1] * 40, sampling=sampling)
        assert answer.finish_reason == "length"
        assert 40 + len(answer.token_ids) in (64, 65)  # the last token needs no room of its own


async def test_streamed_text_is_the_whole_text(folder: str) -> None:
    async with Graph.load("pd").open() as session:
        sampling = Sampling(max_tokens=60, temperature=1.5, seed=1)
        streamed = [event.text async for event in session.stream("naïve 😀", sampling=sampling)]
        whole = await session.generate("naïve 😀", sampling=sampling)
    assert "".join(streamed) == whole.text
    assert not any("\ufffd" in text for text in streamed[:-1]) or "\ufffd" in whole.text
