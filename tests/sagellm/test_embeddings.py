"""Embeddings through a graph: order, several models, lengths, wrong requests, lost workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedding_models import make_embedder, reference_vectors, word_tokenizer

from sagellm import Graph, RequestError, Sampling, ops
from sagellm.graphs.diagnostics import GraphError

WORDS = [f"w{first} w{first + 1}" + " w3" * (first % 5) for first in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_embedder("bert", tmp_path_factory.mktemp("bert"), pooling="mean")


def alone(folder: Path, **options: Any) -> Graph:
    graph = Graph("texts").engine("e", kind="embedding", model=str(folder), **options)
    return graph >> ops.embed(engine="e") >> ops.metrics_sink()


def expected(folder: Path, texts: list[str]) -> np.ndarray:
    token_ids = [word_tokenizer().encode(text).ids for text in texts]
    return np.array(reference_vectors(folder, token_ids, "mean"))


def refuse(graph: Graph) -> None:
    with graph.open():
        pass


async def test_vectors_come_in_the_order_of_the_texts(folder: Path) -> None:
    async with alone(folder, max_num_batched_tokens=16).open() as session:
        found = np.array(await session.embed(WORDS))
        assert abs(found - expected(folder, WORDS)).max() < 1e-4
        statistics = session.statistics()
    assert statistics.ended == {"stop": len(WORDS)}
    (load,) = statistics.engines["e"]
    assert 1 < load.num_steps < len(WORDS)


async def test_texts_may_be_token_ids_and_many(folder: Path) -> None:
    async with alone(folder).open() as session:
        ids = [[0, 5 + number % 200, 2] for number in range(1100)]
        found = np.array(await session.embed(ids))
    assert found.shape == (1100, 64)
    assert np.array_equal(found[0], found[200])
    assert not np.allclose(found[0], found[1])


async def test_shorter_vectors_have_length_one(folder: Path) -> None:
    async with alone(folder).open() as session:
        (whole,), (short,) = await session.embed(["w5"]), await session.embed(["w5"], dimensions=8)
    assert len(short) == 8
    cut = np.array(whole[:8])
    assert short == pytest.approx((cut / np.linalg.norm(cut)).tolist(), abs=1e-6)


async def test_wrong_requests_say_why(folder: Path) -> None:
    async with alone(folder, max_model_len=8).open() as session:
        for texts, fields, says in (
            (["w1 " * 20], {}, "22 tokens, and the model takes 8"),
            ([[]], {}, "empty"),
            ("w1", {}, "give a list of texts"),
            ([3.5], {}, "not float"),
            (["w1"], {"dimensions": 65}, "vectors of 64"),
            (["w1"], {"colour": 1}, "no field 'colour'"),
            ([[999]], {}, "token 999"),
        ):
            with pytest.raises(RequestError, match=says):
                await session.embed(texts, **fields)
        assert await session.embed([]) == []
        await session.idle()


def test_a_blocking_session_embeds(folder: Path) -> None:
    with alone(folder).open() as session:
        (found,) = session.embed(["w7 w8"])
    assert abs(np.array(found) - expected(folder, ["w7 w8"])[0]).max() < 1e-4


async def test_one_graph_generates_and_embeds(folder: Path) -> None:
    options = {"e.model": str(folder)}
    async with Graph.load("embed").open(set=options) as session:
        (found,) = await session.embed(["w7 w8"], model="embedder")
        answer = await session.generate("def", sampling=Sampling(max_tokens=4, ignore_eos=True))
        with pytest.raises(RequestError, match="generates"):
            await session.embed(["w7"])
    assert abs(np.array(found) - expected(folder, ["w7 w8"])[0]).max() < 1e-4
    assert answer.num_tokens == 4


async def test_workers_embed(folder: Path) -> None:
    graph = Graph("texts").engine("e", kind="embedding", model=str(folder), replicas=2)
    graph = graph >> ops.route("load_balanced") >> ops.embed(engine="e")
    async with graph.open(executor="processes") as session:
        found = np.array(await session.embed(WORDS))
    assert abs(found - expected(folder, WORDS)).max() < 1e-4


@pytest.mark.parametrize(
    ("op", "kind", "says"),
    [
        ("generate", "embedding", "needs tokens_out or text_out"),
        ("embed", "local", "needs embed"),
    ],
)
def test_a_graph_is_checked_for_what_its_engines_can_do(op: str, kind: str, says: str) -> None:
    how = {"pooling": "mean"} if kind == "embedding" else {}
    graph = Graph("wrong").engine("e", kind=kind, model="sage-tiny", **how)
    with pytest.raises(GraphError, match=says):
        refuse(graph >> getattr(ops, op)(engine="e"))


def test_a_map_after_embed_is_refused() -> None:
    graph = Graph("wrong").engine("e", kind="embedding", model="sage-tiny", pooling="mean")
    with pytest.raises(GraphError, match="takes answer or event or request, not embedding"):
        refuse(graph >> ops.embed(engine="e") >> ops.map(lambda item: item))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pooling": "max"}, "max"),
        ({"max_num_seqs": 0}, "at least 1"),
        ({"device": "null"}, "does not embed"),
        ({"device": "cpu:x"}, "no number after the colon"),
        ({"dtype": "float16"}, "float16 is not built"),
        ({"max_model_len": 4096}, "made for 2048 tokens"),
        ({"num_blocks": 3}, "num_blocks"),
    ],
)
def test_wrong_options_say_why(options: dict[str, Any], says: str) -> None:
    known = {"kind": "embedding", "model": "sage-tiny", "pooling": "mean", **options}
    graph = Graph("wrong").engine("e", **known) >> ops.embed(engine="e")
    with pytest.raises(GraphError, match=says):
        refuse(graph)
