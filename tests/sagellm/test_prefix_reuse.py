"""Prefix reuse changes no token, and requests do not change each other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from models_on_the_fly import make_model, random_prompts, reference_tokens

from sagellm import Graph, Sampling
from sagellm.session import Session

ENGINES = {"joint": "g", "pd": "pd", "pd_many": "pd"}
NUM_NEW = 24
GREEDY = Sampling(max_tokens=NUM_NEW, ignore_eos=True)


class Exam:
    """Eight prompts after one system prompt of 200 tokens, and transformers' answers."""

    def __init__(self, folder: Path) -> None:
        make_model("qwen3", folder)
        system, *ends = random_prompts([200, 1, 5, 8, 9, 16, 24, 40, 56])
        self.folder = folder
        self.prompts = [system + end for end in ends]
        self.tokens = reference_tokens(folder, self.prompts, NUM_NEW)


@pytest.fixture(scope="module")
def exam(tmp_path_factory: Any) -> Exam:
    return Exam(tmp_path_factory.mktemp("qwen3"))


def opening(graph: str, exam: Exam, **options: Any) -> Any:
    wanted = {"deterministic": True, "max_model_len": 512, **options}
    settings = {f"{e}.{name}": value for e in ENGINES[graph] for name, value in wanted.items()}
    return Graph.load(graph).open(set=settings, model=str(exam.folder))


async def together(
    session: Session, prompts: Sequence[Sequence[int]], sampling: Sampling = GREEDY
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]

    async def ask(index: int) -> None:
        answers[index] = list((await session.generate(prompts[index], sampling=sampling)).token_ids)

    async with trio.open_nursery() as nursery:
        for index in range(len(prompts)):
            nursery.start_soon(ask, index)
    return answers


async def num_hits(session: Session) -> int:
    """The cached tokens that requests found; no block is leased, and the ledgers balance."""
    await session.idle()
    session.executor.core.ledger.check()
    loads = [load for pool in session.statistics().engines.values() for load in pool]
    for load in loads:
        assert load.num_leased_blocks == 0
        assert load.num_free_blocks + load.num_cached_blocks == load.num_blocks
    return sum(load.num_prefix_hits for load in loads)


@pytest.mark.parametrize("graph", ENGINES)
async def test_a_shared_beginning_changes_no_token(graph: str, exam: Exam) -> None:
    async with opening(graph, exam) as session:
        assert await together(session, exam.prompts) == exam.tokens
        num_shared = await num_hits(session)
        assert num_shared >= 6 * 192  # two replicas each compute it once, at most
        assert await together(session, exam.prompts) == exam.tokens
        assert await num_hits(session) - num_shared >= 8 * 192


@pytest.mark.parametrize("graph", ["joint", "pd"])
async def test_switched_off_the_tokens_are_the_same(graph: str, exam: Exam) -> None:
    async with opening(graph, exam, prefix_caching=False) as session:
        assert await together(session, exam.prompts) == exam.tokens
        assert await together(session, exam.prompts) == exam.tokens
        assert await num_hits(session) == 0


@pytest.mark.parametrize("is_on", [True, False])
async def test_a_small_pool_changes_no_token(is_on: bool, exam: Exam) -> None:
    """Evicted blocks are found elsewhere, or computed again."""
    small = {"num_blocks": 33, "prefix_caching": is_on, "prefill_chunk": 40}
    async with opening("joint", exam, **small) as session:
        for _ in range(2):
            assert await together(session, exam.prompts[::-1]) == exam.tokens[::-1]
        assert (await num_hits(session) > 0) == is_on


@pytest.mark.parametrize("is_on", [True, False])
async def test_preemption_changes_no_token(is_on: bool, exam: Exam) -> None:
    """Two that begin differently, 26 blocks at first and 29 at the end, in a pool of 27."""
    prompts = random_prompts([201, 205], seed=5)
    tight = {"num_blocks": 27, "max_model_len": 400, "prefix_caching": is_on}
    async with opening("joint", exam, **tight) as session:
        tokens = reference_tokens(exam.folder, prompts, NUM_NEW)
        assert await together(session, prompts) == tokens
        assert session.statistics().num_preemptions > 0
        assert await together(session, prompts) == tokens
        assert (await num_hits(session) > 0) == is_on


@pytest.mark.parametrize("graph", ["joint", "pd"])
async def test_sampled_tokens_are_the_same(graph: str, exam: Exam) -> None:
    sampling = Sampling(max_tokens=NUM_NEW, temperature=1.0, seed=3, ignore_eos=True)
    runs = []
    for is_on in (True, False):
        async with opening(graph, exam, prefix_caching=is_on) as session:
            for _ in range(2):
                runs.append(await together(session, exam.prompts, sampling))
    assert all(run == runs[0] for run in runs)


@pytest.mark.parametrize("graph", ["joint", "pd"])
async def test_the_turns_of_a_chat_hit_what_was_said(graph: str, exam: Exam) -> None:
    said = exam.prompts[3]
    turns, hits = [], []
    async with opening(graph, exam) as session:
        for end in random_prompts([40, 40, 40], seed=9):
            turns.append(said)
            before = await num_hits(session)
            answer = await session.generate(said, sampling=GREEDY)
            hits.append(answer.num_cached_tokens)
            assert await num_hits(session) - before == answer.num_cached_tokens
            said = (*said, *answer.token_ids, *end)
            turns[-1] = (turns[-1], list(answer.token_ids))
    prompts = [prompt for prompt, _ in turns]
    assert [tokens for _, tokens in turns] == reference_tokens(exam.folder, prompts, NUM_NEW)
    num_known = 0 if graph == "joint" else NUM_NEW  # a prefill engine sees no answers
    assert hits[0] == 0
    for prompt, hit in zip(prompts, hits[1:], strict=False):
        assert hit >= len(prompt) + NUM_NEW - num_known - 16
