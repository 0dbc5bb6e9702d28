"""sage-tiny stays right in every mode, through the prefill/decode graph."""

import pytest
import trio
from exercises import KINDS, exercises

from sagellm import Graph, Sampling
from sagellm.backends.quantised_weight import MODES
from sagellm.builder import RESOLVER
from sagellm.graphs.diagnostics import GraphError
from sagellm.opening.checking import check_graph

NUM_EXERCISES = 20  # of a kind
AT_LEAST = {"int8": 0.95, "int4": 0.85, "w8a8": 0.95}


def settings(mode, **options):
    wanted = {"quantization": mode, **options}
    return {f"{engine}.{name}": value for engine in "pd" for name, value in wanted.items()}


async def answers(session, asked):
    found = [""] * len(asked)

    async def ask(index):
        message = [{"role": "user", "content": asked[index].prompt}]
        answer = await session.generate(message, sampling=Sampling(max_tokens=96))
        found[index] = answer.text

    async with trio.open_nursery() as nursery:
        for index in range(len(asked)):
            nursery.start_soon(ask, index)
    return found


@pytest.mark.parametrize("mode", MODES)
async def test_held_out_exercises_are_answered(mode):
    asked = [one for kind in KINDS for one in exercises(kind, NUM_EXERCISES, seed=3)]
    async with Graph.load("pd").open(set=settings(mode)) as session:
        found = await answers(session, asked)
        await session.idle()
        pools = session.statistics().engines.values()
        assert all(load.num_leased_blocks == 0 for pool in pools for load in pool)
    right = sum(one.is_answered_by(text) for one, text in zip(asked, found, strict=True))
    assert right >= AT_LEAST[mode] * len(asked)


def check(options):
    check_graph(Graph.load("pd").document, RESOLVER, overrides=options)


def test_prefill_and_decode_need_the_same_mode():
    with pytest.raises(GraphError, match="disagree on the quantization: int8 and none"):
        check({"p.quantization": "int8"})


def test_an_unknown_mode_is_refused_with_the_nearest():
    with pytest.raises(GraphError, match="quantization: 'int5' is unknown; did you mean int8"):
        check(settings("int5"))


@pytest.mark.parametrize("mode", MODES)
async def test_answers_in_a_batch_are_those_alone(mode):
    asked = [one for kind in KINDS for one in exercises(kind, 4, seed=4)]
    async with Graph.load("pd").open(set=settings(mode, deterministic=True)) as session:
        together = await answers(session, asked)
        alone = [(await answers(session, [one]))[0] for one in asked]
    assert together == alone
