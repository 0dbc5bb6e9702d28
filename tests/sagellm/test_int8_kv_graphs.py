"""Keys and values in 8 bits in whole graphs: right answers, over every transport, and agreement."""

from pathlib import Path
from typing import Any

import pytest
import trio
from exercises import KINDS, exercises
from process_streams import GREEDY, opened, stream_all

from sagellm import Graph, Sampling
from sagellm.builder import RESOLVER
from sagellm.graphs.diagnostics import GraphError
from sagellm.opening.checking import check_graph
from sagellm.runtime.comm.keys import create_keys

INT8 = {f"{engine}.kv_cache_dtype": "int8" for engine in "pd"}
NUM_EXERCISES = 20  # of a kind
AT_LEAST = 0.95
KNOWN: dict[str, dict[int, list[int]]] = {}


async def test_held_out_exercises_are_answered() -> None:
    asked = [one for kind in KINDS for one in exercises(kind, NUM_EXERCISES, seed=3)]
    found = [""] * len(asked)
    async with Graph.load("pd").open(set=INT8) as session:

        async def ask(index: int) -> None:
            message = [{"role": "user", "content": asked[index].prompt}]
            answer = await session.generate(message, sampling=Sampling(max_tokens=96))
            found[index] = answer.text

        async with trio.open_nursery() as nursery:
            for index in range(len(asked)):
                nursery.start_soon(ask, index)
    right = sum(one.is_answered_by(text) for one, text in zip(asked, found, strict=True))
    assert right >= AT_LEAST * len(asked)


@pytest.mark.parametrize("kv", ["memory", "tcp", "nixl"])
async def test_blocks_in_8_bits_go_over_each_transport(kv: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {**INT8, "executor.kv": kv}
    if kv != "memory":
        create_keys(tmp_path / "keys")
        options |= {
            "executor.address": "tcp://127.0.0.1:0",
            "executor.keys": str(tmp_path / "keys"),
        }
    if not KNOWN:
        async with opened("pd", "tasks", **INT8) as session:
            KNOWN["pd"] = (await stream_all(session, GREEDY)).tokens
    async with opened("pd", **options) as session:
        found = await stream_all(session, GREEDY)
    assert found.tokens == KNOWN["pd"]


def test_engines_that_exchange_blocks_must_agree() -> None:
    document = Graph.load("pd").document
    with pytest.raises(GraphError) as caught:
        check_graph(document, RESOLVER, overrides={"p.kv_cache_dtype": "int8"})
    (found,) = caught.value.diagnostics
    assert "disagree on the KV cache dtype: int8 and auto" in found.message
    assert found.hint == "give `p` and `d` the same `kv_cache_dtype`"
    assert found.position is not None
    assert found.position.file.endswith("pd.yaml")
    assert found.position.line > 0


def test_an_unknown_dtype_is_refused_with_the_nearest() -> None:
    with pytest.raises(GraphError, match="'int9' is unknown; did you mean int8"):
        check_graph(Graph.load("pd").document, RESOLVER, overrides={"p.kv_cache_dtype": "int9"})
