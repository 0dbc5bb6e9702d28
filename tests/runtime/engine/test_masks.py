"""Allowed tokens and bad words: as in transformers, and the same in every batch."""

import itertools

import pytest
import torch
import trio
from engine_driver import hand_over, running
from models_on_the_fly import VOCAB_SIZE, make_model, random_prompts
from msgspec import structs
from transformers import AutoModelForCausalLM

from sagellm import Graph
from sagellm.runtime.engine.kinds.local import open_engine
from sagellm.runtime.engine.options import EngineOptions
from sagellm.runtime.port import EngineRefusal
from sagellm.runtime.sampling import Sampling

PROMPTS = random_prompts((5, 17, 40))
NUM_NEW = 24
ALLOWED = tuple(range(3, VOCAB_SIZE, 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model("qwen3", tmp_path_factory.mktemp("qwen3"))


def open_on(folder, **options):
    options = {"model": str(folder), "deterministic": True, "max_model_len": 128, **options}
    return open_engine(EngineOptions(**options), name="e")


async def greedy(folder, **fields):
    sampling = Sampling(max_tokens=NUM_NEW, ignore_eos=True, **fields)
    async with running(open_on(folder)) as [driver]:
        for index, prompt in enumerate(PROMPTS):
            await driver.submit(str(index), prompt, sampling=sampling)
        await driver.all_done()
    return [driver.replies[str(index), 0].token_ids for index in range(len(PROMPTS))]


def by_transformers(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        tokens = model.generate(ids, max_new_tokens=NUM_NEW, do_sample=False, **options)
        found.append(tokens[0, len(prompt) :].tolist())
    return found


async def test_allowed_tokens_give_the_tokens_of_transformers(folder):
    right = by_transformers(folder, prefix_allowed_tokens_fn=lambda batch, ids: list(ALLOWED))
    assert await greedy(folder, allowed_token_ids=ALLOWED) == right


async def test_bad_words_give_the_tokens_of_transformers(folder):
    plain = await greedy(folder)
    words = {(answer[1],) for answer in plain} | {tuple(answer[4:6]) for answer in plain}
    words |= {tuple(answer[9:12]) for answer in plain}
    words = tuple(word for word in words if all(word[0] != prompt[-1] for prompt in PROMPTS))
    right = by_transformers(folder, bad_words_ids=[list(word) for word in words])
    assert await greedy(folder, bad_words_token_ids=words) == right != plain


SAMPLING = Sampling(
    max_tokens=NUM_NEW,
    ignore_eos=True,
    temperature=1.5,
    seed=3,
    allowed_token_ids=tuple(range(30)),
    bad_words_token_ids=((1,), (2,), *((first, second) for first in range(9) for second in (4, 5))),
)


def check(answer):
    assert set(answer) <= set(range(30)) - {1, 2}
    pairs = set(itertools.pairwise(answer))
    assert not any(first < 9 and second in (4, 5) for first, second in pairs)


@pytest.fixture(scope="module")
def alone(folder):
    """The tokens of three choices for each prompt, one after the other."""
    return trio.run(one_by_one, folder)


async def one_by_one(folder):
    async with running(open_on(folder)) as [driver]:
        for index, prompt in enumerate(PROMPTS):
            for choice in range(3):
                reply = await driver.submit(str(index), prompt, choice=choice, sampling=SAMPLING)
                await driver.all_done()
                check(reply.token_ids)
    return {key: reply.token_ids for key, reply in driver.replies.items()}


async def test_batched_and_preempted_is_alone(folder, alone):
    crowded = open_on(folder, num_blocks=9, block_size=16)
    async with running(crowded) as [driver]:
        for index, prompt in enumerate(PROMPTS):
            for choice in range(3):
                await driver.submit(str(index), prompt, choice=choice, sampling=SAMPLING)
        await driver.all_done()
    assert crowded.load.num_preemptions > 0
    assert {key: reply.token_ids for key, reply in driver.replies.items()} == alone


@pytest.mark.parametrize(("graph", "engines"), [("joint", "g"), ("pd", "pd")])
async def test_choices_of_a_graph_are_as_alone(folder, alone, graph, engines):
    wanted = {"deterministic": True, "max_model_len": 128}
    opening = Graph.load(graph).open(
        set={f"{e}.{name}": value for e in engines for name, value in wanted.items()},
        model=str(folder),
    )
    async with opening as session:
        sampling = structs.replace(SAMPLING, n=3)
        found = [
            [answer.token_ids for answer in await session.generate_all(prompt, sampling=sampling)]
            for prompt in PROMPTS
        ]
    for (index, choice), tokens in alone.items():
        assert found[int(index)][choice] == tuple(tokens)


async def test_handed_over_is_alone(folder):
    async with running(open_on(folder)) as [driver]:
        whole = await driver.submit("r", PROMPTS[1], sampling=SAMPLING)
        await driver.all_done()
    async with running(open_on(folder), open_on(folder)) as [prefill, decode]:
        first, rest = await hand_over(prefill, decode, "r", PROMPTS[1], sampling=SAMPLING)
    assert [*first.token_ids, *rest.token_ids] == whole.token_ids


@pytest.mark.parametrize("speculation", [None, "ngram"])
async def test_where_no_token_is_left_the_answer_stops(folder, speculation):
    """The second token is forbidden after every first."""
    banned = tuple((first, second) for first in (7, 8) for second in (7, 8))
    sampling = Sampling(
        max_tokens=9, allowed_token_ids=(7, 8), bad_words_token_ids=banned, prompt_logprobs=0
    )
    async with running(open_on(folder, speculation=speculation)) as [driver]:
        reply = await driver.submit("r", PROMPTS[0], sampling=sampling)
        other = await driver.submit("o", PROMPTS[1], max_tokens=5)
        await driver.all_done()
    assert len(reply.token_ids) == 1
    assert (reply.last.finish_reason, reply.last.error) == ("stop", None)
    assert sum(len(event.prompt_logprobs) for event in reply.events) == len(PROMPTS[0]) - 1
    assert other.last.finish_reason == "length"


@pytest.mark.parametrize("graph", ["joint", "pd"])
async def test_where_no_first_token_is_left_the_answer_is_empty(folder, graph):
    """Only the end-of-text token is allowed, before `min_tokens`."""
    sampling = Sampling(
        max_tokens=9, min_tokens=3, allowed_token_ids=(5,), stop_token_ids=(5,), prompt_logprobs=0
    )
    async with Graph.load(graph).open(model=str(folder)) as session:
        answer = await session.generate(PROMPTS[2], sampling=sampling)
        await session.idle()
        session.executor.core.ledger.check()
    assert (answer.finish_reason, answer.token_ids, answer.text) == ("stop", (), "")
    assert len(answer.prompt_logprobs) == len(PROMPTS[2]) - 1


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"allowed_token_ids": (VOCAB_SIZE,)}, "allowed_token_ids has token"),
        ({"bad_words_token_ids": ((1, -1),)}, "bad_words_token_ids has token -1"),
        ({"bad_words_token_ids": ((),)}, "bad_words_token_ids holds an empty sequence"),
        ({"bad_words": ("",)}, "bad_words holds an empty string"),
        (
            {"allowed_token_ids": (4,), "bad_words_token_ids": ((4,),)},
            "allowed_token_ids are all banned",
        ),
    ],
)
async def test_what_cannot_be_is_refused(folder, fields, why):
    async with running(open_on(folder)) as [driver]:
        with pytest.raises(EngineRefusal, match=why):
            await driver.submit("r", PROMPTS[0], sampling=Sampling(max_tokens=2, **fields))
