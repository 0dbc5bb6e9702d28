"""Every shipped graph gives the tokens of transformers on the same weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from detached import installed
from models_on_the_fly import (
    FAMILIES,
    Reference,
    make_model,
    random_prompts,
    reference,
    scarce_blocks,
)
from msgspec import structs

from sagellm import Graph, Request, Sampling, ops
from sagellm.session import Session

LENGTHS = (1, 2, 5, 17, 40, 90, 180, 300)
NUM_NEW = 64
ENGINES = {"pd": "pd", "joint": "g", "pd_many": "pd"}


@dataclass(frozen=True)
class Exam:
    folder: Path
    prompts: list[tuple[int, ...]]
    right: Reference
    scarce: dict[str, int]


@pytest.fixture(scope="module", params=FAMILIES)
def exam(request: Any, tmp_path_factory: Any) -> Exam:
    folder = make_model(request.param, tmp_path_factory.mktemp(request.param))
    prompts = random_prompts(LENGTHS)
    right = reference(folder, prompts, NUM_NEW)
    right.check()
    return Exam(folder, prompts, right, scarce_blocks(request.param))


def exact(graph: str, **options: Any) -> dict[str, Any]:
    """The engine settings under which tokens must be equal."""
    wanted = {"deterministic": True, "max_model_len": 512, **options}
    return {f"{e}.{name}": value for e in ENGINES[graph] for name, value in wanted.items()}


async def together(
    session: Session, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]

    async def ask(index: int) -> None:
        answer = await session.generate(prompts[index], sampling=sampling)
        answers[index] = list(answer.token_ids)

    async with trio.open_nursery() as nursery:
        for index in range(len(prompts)):
            nursery.start_soon(ask, index)
    return answers


async def check_at_rest(session: Session) -> None:
    await session.idle()
    session.executor.core.ledger.check()
    for pool in session.statistics().engines.values():
        assert all(load.num_leased_blocks == 0 for load in pool)


@pytest.mark.parametrize("graph", ENGINES)
async def test_greedy_tokens_equal_transformers(graph: str, exam: Exam) -> None:
    sampling = Sampling(max_tokens=NUM_NEW, ignore_eos=True)
    opening = Graph.load(graph).open(set=exact(graph), model=str(exam.folder))
    async with opening as session:
        assert await together(session, exam.prompts, sampling) == exam.right.tokens
        await check_at_rest(session)


@pytest.mark.parametrize("exam", ["llama"], indirect=True)
async def test_engines_that_compute_at_once_on_two_threads_each(exam: Exam) -> None:
    sampling = Sampling(max_tokens=NUM_NEW, ignore_eos=True)
    there = exact("pd_many", threads=2)
    async with Graph.load("pd_many").open(set=there, model=str(exam.folder)) as session:
        assert await together(session, exam.prompts, sampling) == exam.right.tokens


async def test_greedy_tokens_survive_preemption(exam: Exam) -> None:
    sampling = Sampling(max_tokens=NUM_NEW, ignore_eos=True)
    tight = exact("pd", **exam.scarce)
    async with Graph.load("pd").open(set=tight, model=str(exam.folder)) as session:
        assert await together(session, exam.prompts, sampling) == exam.right.tokens
        assert session.statistics().num_preemptions > 0
        await check_at_rest(session)


@pytest.fixture
def device(request: Any) -> Iterator[str]:
    """The name of a backend, installed if it is one of the tests."""
    with installed():
        yield request.param


@pytest.mark.in_process
@pytest.mark.parametrize("device", ["cpu", "detached"], indirect=True)
@pytest.mark.parametrize("exam", ["qwen3"], indirect=True)
async def test_seeded_sampling_is_the_same_alone_batched_split_and_preempted(
    exam: Exam, device: str
) -> None:
    sampling = Sampling(max_tokens=40, temperature=1.0, top_p=0.95, seed=11, ignore_eos=True)
    runs = []
    for graph, options in (("joint", {}), ("pd", {}), ("pd_many", {}), ("pd", {"num_blocks": 34})):
        there = exact(graph, device=device, **options)
        opening = Graph.load(graph).open(set=there, model=str(exam.folder))
        async with opening as session:
            runs.append(await together(session, exam.prompts, sampling))
    async with Graph.load("joint").open(set=exact("joint"), model=str(exam.folder)) as session:
        alone = []
        for prompt in exam.prompts:
            answer = await session.generate(prompt, sampling=sampling)
            alone.append(list(answer.token_ids))
    assert all(run == alone for run in runs)


@pytest.mark.parametrize("exam", ["llama"], indirect=True)
async def test_the_choices_of_a_forked_request_keep_their_own_prompts(exam: Exam) -> None:
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    both = [exam.prompts[4], exam.prompts[5]]

    def fork(request: Request) -> list[Request]:
        return [structs.replace(request, prompt_token_ids=prompt) for prompt in both]

    graph = Graph("forked").engine("g", model=str(exam.folder), deterministic=True)
    graph >> ops.flat_map(fork) >> ops.generate(engine="g")
    async with graph.open() as session:
        answers = await session.generate_all(exam.prompts[0], sampling=sampling)
        await check_at_rest(session)
    assert [list(a.token_ids) for a in answers] == [exam.right.tokens[i][:20] for i in (4, 5)]


@pytest.mark.parametrize("exam", ["llama"], indirect=True)
@pytest.mark.parametrize("graph", ["pd", "joint"])
async def test_the_choices_of_one_request_equal_requests_of_their_own(
    graph: str, exam: Exam
) -> None:
    sampling = Sampling(max_tokens=20, temperature=1.0, seed=5, n=3, ignore_eos=True)
    opening = Graph.load(graph).open(set=exact(graph), model=str(exam.folder))
    async with opening as session:
        prompt = exam.prompts[4]
        once = await session.generate_all(prompt, sampling=sampling)
        again = await session.generate_all(prompt, sampling=sampling)
        assert [a.token_ids for a in once] == [a.token_ids for a in again]
        assert len({a.token_ids for a in once}) == 3
        await check_at_rest(session)
