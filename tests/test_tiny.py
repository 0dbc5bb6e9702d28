"""The whole path in little: a prompt through pd.yaml and sage-tiny, to an answer."""

import time

import pytest

from sagellm import Graph, Sampling

QUESTION = [{"role": "user", "content": "What is 23 + 45?"}]


@pytest.mark.alone
async def test_a_prompt_becomes_an_answer_within_a_second() -> None:
    async with Graph.load("graphs/pd.yaml").open(set={"split.min_uncached_tokens": 8}) as pd:
        started = time.perf_counter()
        answer = await pd.generate(QUESTION, sampling=Sampling(max_tokens=8))
        elapsed_s = time.perf_counter() - started
    assert answer.text.strip() == "68"
    assert answer.finish_reason == "stop"
    assert answer.stamps.transferred_s is not None
    assert elapsed_s < 1.0
