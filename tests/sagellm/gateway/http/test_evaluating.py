"""Evaluations over HTTP before a real model, joint and split: against transformers."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from gateway_calls import post
from models_on_the_fly import VOCAB_SIZE, make_model, random_prompts
from transformers import AutoModelForCausalLM

from sagellm import Graph
from sagellm.gateway.graph_bridge import SessionBridge
from sagellm.gateway.http.endpoints import completions
from sagellm.gateway.protocol.sampling_params import ModelCard
from sagellm.gateway.settings import Streaming

PROMPTS = [list(prompt) for prompt in random_prompts((2, 9, 70))]
CARD = ModelCard(names=("m",), root="m", max_model_len=256, vocab_size=VOCAB_SIZE, created=0)
TOP = 20
LETTERS = [ord(letter) - ord("!") for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]  # byte-level ids
STREAMED = pytest.mark.parametrize("stream", [True, False])
GRAPHS = pytest.mark.parametrize("graph", ["joint", "pd"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model("qwen3", tmp_path_factory.mktemp("qwen3"), initializer_range=0.05)


@pytest.fixture(scope="module")
def right(folder):
    """Log probabilities of every prompt: row i is of token i + 1."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].log_softmax(-1) for prompt in PROMPTS]


@asynccontextmanager
async def served(graph: str, folder: Any) -> AsyncIterator[Any]:
    async with Graph.load(graph).open(model=str(folder)) as session:
        bridge = SessionBridge(session, Streaming())

        async def ask(**body: Any) -> list[dict[str, Any]]:
            """The choices, whole or joined from their chunks."""
            answered = await post(
                completions,
                bridge,
                {"temperature": 0, **body},
                model=CARD,
                tokenizer=session.tokenizer,
            )
            assert answered.status == 200, answered.body
            return _choices(answered.events if body.get("stream") else [answered.json])

        yield ask
        await session.idle()
        session.executor.core.ledger.check()


def _choices(chunks: list[Any]) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        begun = found.setdefault(choice["index"], {"text": "", "tokens": []})
        begun |= {name: value for name, value in choice.items() if name.startswith("prompt_")}
        begun["text"] += choice["text"]
        begun["tokens"] += (choice["logprobs"] or {"tokens": []})["tokens"]
        begun["finish_reason"] = choice["finish_reason"]
        begun["logprobs"] = choice["logprobs"]
    return [found[index] for index in sorted(found)]


@GRAPHS
@STREAMED
async def test_prompts_alone_have_the_logprobs_of_transformers(graph, stream, folder, right):
    async with served(graph, folder) as ask:
        fields = {"max_tokens": 0, "echo": True, "logprobs": TOP, "stream": stream}
        choices = await ask(prompt=PROMPTS, return_tokens_as_token_ids=True, **fields)
    for prompt, logprobs, choice in zip(PROMPTS, right, choices, strict=True):
        found = choice["logprobs"]
        assert choice["finish_reason"] == "length"
        assert found["tokens"] == [f"token_id:{token}" for token in prompt]
        own = logprobs[range(len(prompt) - 1), prompt[1:]].tolist()
        assert found["token_logprobs"][0] is None
        assert found["token_logprobs"][1:] == pytest.approx(own, abs=1e-4)
        for row, token, top in zip(logprobs, prompt[1:], found["top_logprobs"][1:], strict=False):
            best = {f"token_id:{one}" for one in (*row.topk(TOP).indices.tolist(), token)}
            assert set(top) == best


@GRAPHS
@STREAMED
async def test_prompt_logprobs_have_the_ranks_of_transformers(graph, stream, folder, right):
    async with served(graph, folder) as ask:
        choices = await ask(prompt=PROMPTS, prompt_logprobs=2, max_tokens=3, n=2, stream=stream)
    for index, choice in enumerate(choices):
        prompt, logprobs = PROMPTS[index // 2], right[index // 2]
        assert choice["prompt_logprobs"][0] is None
        for row, token, found in zip(
            logprobs, prompt[1:], choice["prompt_logprobs"][1:], strict=False
        ):
            own = found[str(token)]
            assert next(iter(found)) == str(token)
            assert own["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
            assert own["rank"] == int((row > row[token]).sum()) + 1
            ranks = {int(one): entry["rank"] for one, entry in found.items()}
            best = row.topk(2).indices.tolist()
            assert ranks == {token: own["rank"]} | {best[0]: 1, best[1]: 2}


@GRAPHS
@STREAMED
async def test_allowed_tokens_and_bad_words(graph, stream, folder):
    fields = {"max_tokens": 12, "ignore_eos": True, "logprobs": 0, "stream": stream}
    fields |= {"return_tokens_as_token_ids": True, "n": 2, "temperature": 1.0, "seed": 3}
    async with served(graph, folder) as ask:
        letters = {"allowed_token_ids": LETTERS}
        plain = await ask(prompt=PROMPTS[1], **fields, **letters)
        words = sorted({letter for choice in plain for letter in choice["text"]})[:5]
        banned = await ask(prompt=PROMPTS[1], **fields, **letters, bad_words=words)
    assert {int(token[9:]) for choice in plain for token in choice["tokens"]} <= set(LETTERS)
    assert all(choice["text"].isalpha() for choice in (*plain, *banned))
    assert not any(set(words) & set(choice["text"]) for choice in banned)
