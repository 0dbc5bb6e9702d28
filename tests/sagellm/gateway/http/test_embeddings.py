"""/v1/embeddings: bodies, answers, usage, errors, and models that do not embed."""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from embedding_models import CLS, SEP, make_embedder, reference_vectors, word_tokenizer
from gateway_served import Reply, get, post, read_reply
from gateway_session import ServedSession, served_session
from waiting import until

PATH = "/v1/embeddings"
TEXTS = ["w1 w2 w3", "w9", "w1 w2 w4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_embedder("bert", tmp_path_factory.mktemp("bert"), pooling="mean")


@asynccontextmanager
async def served(folder: Path, server: str = "hypercorn", **how: Any) -> AsyncIterator[Any]:
    options = {"e.model": str(folder), "g.device": "null", **how.pop("options", {})}
    async with served_session(server, "embed", options, **how) as found:
        yield found


async def ask(served: ServedSession, body: Any, *, raw: bytes | None = None) -> Reply:
    async with await served.connect() as stream:
        await stream.send_all(raw or post(PATH, body))
        return await read_reply(stream)


async def vectors(served: ServedSession, **body: Any) -> np.ndarray:
    reply = await ask(served, {"model": "embedder", **body})
    assert reply.status == 200, reply.body
    return np.array([one["embedding"] for one in json.loads(reply.body)["data"]])


def expected(folder: Path, texts: list[str]) -> np.ndarray:
    ids = [word_tokenizer().encode(text).ids for text in texts]
    return np.array(reference_vectors(folder, ids, "mean"))


@pytest.mark.parametrize(
    ("server", "num_gateways"), [("hypercorn", 0), ("uvicorn", 0), ("hypercorn", 1)]
)
async def test_texts_are_answered_in_order(folder: Path, server: str, num_gateways: int) -> None:
    async with served(folder, server, num_gateways=num_gateways) as one:
        reply = await ask(one, {"input": TEXTS, "model": "embedder", "user": "u"})
    answer = json.loads(reply.body)
    assert (answer["object"], answer["model"]) == ("list", "embedder")
    assert [(each["object"], each["index"]) for each in answer["data"]] == [
        ("embedding", 0),
        ("embedding", 1),
        ("embedding", 2),
    ]
    assert answer["usage"] == {"prompt_tokens": 13, "total_tokens": 13}
    found = np.array([each["embedding"] for each in answer["data"]])
    assert abs(found - expected(folder, TEXTS)).max() < 1e-4


async def test_every_kind_of_input_is_taken(folder: Path) -> None:
    ids = [word_tokenizer().encode(text).ids for text in TEXTS]
    async with served(folder) as one:
        whole = await vectors(one, input=TEXTS)
        for given, chosen in ((TEXTS[0], [0]), (ids[1], [1]), (ids, [0, 1, 2])):
            found = await vectors(one, input=given)
            assert abs(found - whole[chosen]).max() < 1e-6
        first = json.loads((await ask(one, {"input": "w9"})).body)  # the first model that embeds
        assert first["model"] == "embedder"


async def test_base64_holds_the_same_numbers(folder: Path) -> None:
    async with served(folder) as one:
        whole = await vectors(one, input=TEXTS)
        body = {"input": TEXTS, "model": "embedder", "encoding_format": "base64"}
        answer = json.loads((await ask(one, body)).body)
    coded = [base64.b64decode(each["embedding"]) for each in answer["data"]]
    assert np.array_equal(np.array([np.frombuffer(each, "<f4") for each in coded]), whole)


async def test_dimensions_shorten_vectors_to_length_one(folder: Path) -> None:
    async with served(folder) as one:
        whole, short = (
            await vectors(one, input=TEXTS),
            await vectors(one, input=TEXTS, dimensions=8),
        )
    cut = whole[:, :8]
    assert abs(short - cut / np.linalg.norm(cut, axis=1, keepdims=True)).max() < 1e-6


async def test_a_long_text_is_cut_where_the_call_wants_it(folder: Path) -> None:
    long = " ".join(["w7"] * 300)
    async with served(folder, options={"e.max_model_len": 16}) as one:
        cut, kept = (
            await vectors(one, input=[[CLS, *[7 + 4] * 14, SEP]]),
            await vectors(one, input=long, truncate_prompt_tokens=-1),
        )
        assert abs(cut - kept).max() < 1e-6
        few = [
            await vectors(one, input=given, truncate_prompt_tokens=3) for given in (long, [11] * 9)
        ]
        two = await vectors(one, input=[[CLS, 11, SEP], [11] * 3])
    assert abs(np.concatenate(few) - two).max() < 1e-6


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "input", "is missing"),
        ({"input": ""}, "input", "length >= 1"),
        ({"input": []}, "input", "length >= 1"),
        ({"input": [""]}, "input[0]", "length >= 1"),
        ({"input": [[]]}, "input[0]", "length >= 1"),
        ({"input": {"a": 1}}, "input", ""),
        ({"input": ["a", 1]}, "input", "mixes text"),
        ({"input": [1.5]}, "input[0]", ""),
        ({"input": [True]}, "input[0]", ""),
        ({"input": ["a"] * 1025}, "input", "has 1025 texts; the limit is 1024"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "one of float, base64"),
        ({"input": "a", "dimensions": 0}, "dimensions", ">= 1"),
        ({"input": "a", "dimensions": 65}, "dimensions", "the model has vectors of 64"),
        ({"input": "w1 " * 300}, "input", "has 302 tokens, and the model takes 130"),
        ({"input": ["w1", "w1 " * 300]}, "input[1]", "has 302 tokens"),
        ({"input": "w1 " * 30000}, "input", "much longer"),
        ({"input": [[5, 300]]}, "input", "token 300; the model knows 0 ... 299"),
        ({"input": [[5], [300]]}, "input[1]", "token 300"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "send -1"),
        ({"input": "a", "inputs": "b"}, "inputs", ""),
        ({"prompt": "a"}, "prompt", "send `input`"),
        ({"input": "a", "model": "sage-tiny"}, "model", "sage-tiny generates; embedder embeds"),
    ],
)
async def test_wrong_bodies_say_why(
    shared: ServedSession, body: dict[str, Any], param: str, says: str
) -> None:
    reply = await ask(shared, body)
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["param"]) == (400, param), error
    assert says in error["message"]


@pytest.fixture
async def shared(folder: Path) -> AsyncIterator[ServedSession]:
    async with served(folder) as found:
        yield found


async def test_a_model_that_embeds_answers_no_chat(shared: ServedSession) -> None:
    chat = {"model": "embedder", "messages": [{"role": "user", "content": "hi"}]}
    for path, body in (
        ("/v1/chat/completions", chat),
        ("/v1/completions", {"model": "embedder", "prompt": "hi"}),
    ):
        reply = await ask(shared, {}, raw=post(path, body))
        error = json.loads(reply.body)["error"]
        assert (reply.status, error["param"]) == (400, "model")
        assert "/v1/embeddings" in error["message"]


async def test_an_unknown_model_is_not_found(shared: ServedSession) -> None:
    reply = await ask(shared, {"input": "a", "model": "embeder"})
    assert reply.status == 404
    assert b"embedder" in reply.body


async def test_metrics_count_texts_and_their_tokens(folder: Path) -> None:
    async with served(folder) as one:
        await vectors(one, input=TEXTS)
        async with await one.connect() as stream:
            await stream.send_all(get("/metrics"))
            metrics = (await read_reply(stream)).body.decode()
    assert counted(metrics, "vllm:prompt_tokens_total", 'model_name="embedder"') == 13
    assert counted(metrics, "vllm:request_success_total", 'model_name="embedder"') == 3


def counted(metrics: str, name: str, label: str) -> float:
    """The sum of all samples of a metric that have a label."""
    lines = [line for line in metrics.splitlines() if line.startswith(name) and label in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


async def test_a_client_that_leaves_frees_its_texts(folder: Path) -> None:
    async with served(folder, options={"e.max_num_batched_tokens": 128}) as one:
        stream = await one.connect()
        await stream.send_all(post(PATH, {"input": ["w5 " * 100] * 1000, "model": "embedder"}))
        await until(lambda: one.session.statistics().num_open > 0)
        await stream.aclose()
        with trio.fail_after(20):
            await one.session.idle()
        (load,) = one.session.statistics().engines["e"]
    assert load.num_steps < 1000


async def test_without_a_model_that_embeds_the_route_says_so() -> None:
    async with served_session("hypercorn", "joint", {"g.device": "null"}) as one:
        reply = await ask(one, {"input": "a"})
    assert reply.status == 400
    assert b"operator `embed`" in reply.body
