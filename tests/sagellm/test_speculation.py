"""Speculation through whole graphs: equal answers, counts, and the graph's check."""

from pathlib import Path
from typing import Any

import pytest
import trio
from gateway_calls import CARD
from looping_models import make_looping_model
from models_on_the_fly import random_prompts

from sagellm import Graph, Sampling
from sagellm.gateway.metrics.exposition import GatewayMeters
from sagellm.graphs.diagnostics import GraphError
from sagellm.session import Session

PROMPTS = random_prompts((2, 5, 17, 40, 60, 90, 120, 180))
ENGINES = {"pd": "pd", "joint": "g"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return make_looping_model(tmp_path_factory.mktemp("looping"))


def settings(graph: str, **options: Any) -> dict[str, Any]:
    wanted = {"deterministic": True, "max_model_len": 512, **options}
    return {f"{e}.{name}": value for e in ENGINES[graph] for name, value in wanted.items()}


async def together(session: Session, sampling: Sampling) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in PROMPTS]

    async def ask(index: int) -> None:
        answer = await session.generate(PROMPTS[index], sampling=sampling)
        answers[index] = list(answer.token_ids)

    async with trio.open_nursery() as nursery:
        for index in range(len(PROMPTS)):
            nursery.start_soon(ask, index)
    return answers


@pytest.mark.parametrize("options", [{}, {"num_blocks": 34}], ids=["ample", "tight"])
@pytest.mark.parametrize("kind", ["ngram", "draft"])
@pytest.mark.parametrize("graph", ENGINES)
async def test_answers_are_those_without(
    graph: str, kind: str, options: dict[str, Any], folder: Path
) -> None:
    drafts = {"speculation": kind, **({"draft_model": str(folder)} if kind == "draft" else {})}
    for fields in ({}, {"temperature": 0.9, "seed": 3}):
        sampling = Sampling(max_tokens=70, ignore_eos=True, **fields)
        found = []
        for more in ({}, drafts):
            opening = Graph.load(graph).open(
                set=settings(graph, **options, **more), model=str(folder)
            )
            async with opening as session:
                found.append(await together(session, sampling))
                await session.idle()
                statistics = session.statistics()
                loads = [load for pool in statistics.engines.values() for load in pool]
                assert all(load.num_leased_blocks == 0 for load in loads)
                session.executor.core.ledger.check()
        assert found[0] == found[1]
        assert sum(load.drafts.num_draft_tokens for load in loads) > 0


async def test_the_gateway_counts_drafts_under_vllms_names(folder: Path) -> None:
    opening = Graph.load("joint").open(
        set=settings("joint", speculation="ngram"), model=str(folder)
    )
    async with opening as session:
        await session.generate(PROMPTS[0], sampling=Sampling(max_tokens=100, ignore_eos=True))
        meters = GatewayMeters(session, models=(CARD,), endpoints=())
        text = (await meters.exposition())[0].decode()
        [load] = session.statistics().engines["g"]
    assert f"spec_decode_num_drafts_total{{{LABELS}}} {load.drafts.num_drafts}.0" in text
    assert f"num_draft_tokens_total{{{LABELS}}} {load.drafts.num_draft_tokens}.0" in text
    assert f"num_accepted_tokens_total{{{LABELS}}} {load.drafts.num_accepted_tokens}.0" in text
    assert text.count("vllm:spec_decode_num_accepted_tokens_per_pos_total{") == 4


LABELS = 'engine="0",model_name="m"'


async def test_without_speculation_nothing_is_said_of_drafts() -> None:
    async with Graph.load("joint").open(set={"g.device": "null"}) as session:
        meters = GatewayMeters(session, models=(CARD,), endpoints=())
        assert b"spec_decode" not in (await meters.exposition())[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"g.speculation": "draft", "g.draft_model": "sage-tiny"}, "different vocabularies"),
        ({"g.speculation": "draft", "g.draft_model": "sage-tiiny"}, "did you mean sage-tiny"),
        ({"g.speculation": "draft", "g.draft_model": "null"}, "null computes nothing"),
        ({"g.speculation": "n-gram"}, "did you mean ngram"),
        (
            {"g.speculation": "ngram", "g.device": "null"},
            "`speculation` is an option of kind `local`, and engine `g` is of kind `modelled`",
        ),
    ],
)
async def test_a_check_refuses_before_a_weight_is_read(
    options: dict[str, str], reason: str, folder: Path
) -> None:
    with pytest.raises(GraphError, match=reason):
        async with Graph.load("joint").open(set=options, model=str(folder)):
            pass
