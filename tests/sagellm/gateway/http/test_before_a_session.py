"""Endpoints before a real session: clients that leave free everything, at once."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import trio
from gateway_calls import Client, gateway_before
from trio.testing import MockClock

from sagellm import Graph, ops
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.graph_bridge import SessionBridge
from sagellm.gateway.http.endpoints import cancel, chat, completions
from sagellm.gateway.protocol.sampling_params import ModelCard
from sagellm.gateway.settings import Streaming
from sagellm.session import Session

STEP_S = 0.01
PROMPT = {"prompt": [1] * 100, "max_tokens": 50, "ignore_eos": True}
CARD = ModelCard(names=("m",), root="m", max_model_len=4096, vocab_size=256, created=0)


@asynccontextmanager
async def before(**engine: Any) -> AsyncIterator[tuple[Gateway, Session]]:
    options = {"decode_step_s": STEP_S, "num_blocks": 512, **engine}
    graph = Graph("g").engine("g", device="null", **options)
    graph = graph >> ops.admission(max_queued=8) >> ops.policy_sort() >> ops.generate(engine="g")
    async with graph.open() as session:
        yield gateway_before(SessionBridge(session, Streaming()), model=CARD), session


def num_leased(session: Session) -> int:
    pools = session.statistics().engines.values()
    return sum(load.num_leased_blocks for pool in pools for load in pool)


@pytest.mark.parametrize("stream", [True, False])
async def test_blocks_of_a_client_that_leaves_are_free_after_one_step(
    stream: bool, autojump_clock: MockClock
):
    async with before() as (gateway, session), trio.open_nursery() as nursery:
        client = Client({**PROMPT, "stream": stream})
        nursery.start_soon(client.call, completions, gateway)
        await trio.sleep(20 * STEP_S)
        assert num_leased(session)
        client.gone.set()
        await trio.sleep(1.5 * STEP_S)
        assert not num_leased(session)
        assert session.executor.core.ledger.ended == {"cancelled": 1}


async def test_clients_that_leave_at_random_points_leave_nothing(autojump_clock: MockClock):
    draw = random.Random(3)

    async def ask_and_leave(gateway: Gateway) -> None:
        many = {"prompt": [[1] * draw.randint(1, 200), [2, 3]], "n": 2}
        body = {**PROMPT, "stream": draw.random() < 0.5, **draw.choice([{}, many])}
        client = Client(body)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.call, completions, gateway)
            await trio.sleep(draw.uniform(0, 1))
            client.gone.set()

    async with before() as (gateway, session):
        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(ask_and_leave, gateway)
                await trio.sleep(draw.uniform(0, 0.05))
        await session.idle()
        session.executor.core.ledger.check()
        assert session.executor.core.ledger.ended["cancelled"] > 20
        assert session.executor.core.ledger.ended["length"] > 20
        assert not num_leased(session)
        assert gateway.budgets.num_open("t") == 0
        assert not gateway.requests_of("abc")


async def test_a_client_that_left_may_come_again_with_the_same_id(autojump_clock: MockClock):
    """Its engine ends the first call at the next step only."""
    async with before() as (gateway, _), trio.open_nursery() as nursery:
        first = Client({**PROMPT, "stream": True})
        nursery.start_soon(first.call, completions, gateway)
        await first.received(1)
        first.gone.set()
        while gateway.requests_of("abc"):
            await trio.lowlevel.checkpoint()
        again = await Client({**PROMPT, "stream": False}).call(completions, gateway)
    assert again.status == 200, again.body


async def test_a_client_that_does_not_read_loses_its_place_long_before_its_connection(
    autojump_clock: MockClock,
):
    async with before() as (gateway, session), trio.open_nursery() as nursery:
        client = Client({**PROMPT, "max_tokens": 3000, "stream": True})
        nursery.start_soon(client.call, completions, gateway)
        await client.received(1)
        client.reads = anyio.Event()
        await trio.sleep(300 * STEP_S)
        assert session.executor.core.ledger.ended == {"cancelled": 1}
        assert not num_leased(session)
        client.reads.set()
        await trio.sleep(STEP_S)
        error = client.answered.events[-1]["error"]
    assert error["code"] == "slow_reader"
    assert client.answered.is_whole


@pytest.mark.parametrize("stream", [True, False])
async def test_overload_is_refused_with_its_status(stream: bool, autojump_clock: MockClock):
    async with before(max_num_seqs=1) as (gateway, _), trio.open_nursery() as nursery:
        clients = [Client({**PROMPT, "stream": stream}) for _ in range(30)]
        for number, client in enumerate(clients):
            nursery.start_soon(
                lambda c=client, n=number: c.call(completions, gateway, request_id=f"{n}")
            )
    statuses = {client.answered.status for client in clients}
    assert statuses == {200, 503}
    assert {c.answered.json["error"]["code"] for c in clients if c.answered.status == 503} == {
        "queue_full"
    }


async def test_a_time_limit_is_answered_as_one(autojump_clock: MockClock):
    async with before() as (gateway, _):
        answered = await Client({**PROMPT, "timeout_s": 0.1}).call(completions, gateway)
    assert answered.status == 504


async def test_an_admin_s_cancel_is_an_error_of_the_stream(autojump_clock: MockClock):
    async with before() as (gateway, _), trio.open_nursery() as nursery:
        client = Client({**PROMPT, "stream": True})
        nursery.start_soon(client.call, completions, gateway)
        await client.received(1)
        answered = await Client(id="cmpl-abc").call(cancel, gateway)
        assert answered.status == 200
    assert client.answered.events[-1]["error"]["code"] == "abort"


async def test_streamed_is_whole_for_a_model_of_bytes():
    """sage-tiny at a temperature that breaks characters apart."""
    body = {
        "messages": [{"role": "user", "content": "3 + 4"}],
        "max_tokens": 60,
        "temperature": 5.0,
        "ignore_eos": True,
        "seed": 1,
        "n": 2,
        "logprobs": True,
    }
    async with Graph.load("joint").open(model="sage-tiny") as session:
        fields = {"tokenizer": session.tokenizer, "model": CARD}
        gateway = gateway_before(SessionBridge(session, Streaming()), **fields)
        whole = await Client(body).call(chat, gateway)
        streamed = await Client({**body, "stream": True}).call(chat, gateway)
    texts = [choice["message"]["content"] for choice in whole.json["choices"]]
    assert [streamed.text(0), streamed.text(1)] == texts
    assert "\N{REPLACEMENT CHARACTER}" in texts[0]
    assert len(whole.json["choices"][0]["logprobs"]["content"]) == 60
    assert whole.json["usage"]["completion_tokens"] == 120


@pytest.mark.parametrize("stream", [True, False])
async def test_no_tenant_and_no_salt_finds_what_another_computed(
    stream: bool, autojump_clock: MockClock
):
    async with before() as (gateway, session):

        async def cached(tenant: str, **fields: Any) -> int:
            """What usage says; the engine's own count of hits says the same."""
            hits = num_hits(session)
            client = Client({**PROMPT, "stream": stream, **USAGE[stream], **fields})
            answered = await client.call(completions, gateway, tenant=tenant)
            usage = answered.events[-1]["usage"] if stream else answered.json["usage"]
            found: int = usage["prompt_tokens_details"]["cached_tokens"]
            assert num_hits(session) - hits == found
            return found

        assert [await cached("a"), await cached("a")] == [0, 96]
        assert [await cached("b"), await cached("a", cache_salt="x")] == [0, 0]
        assert [await cached("b"), await cached("a", cache_salt="x")] == [96, 96]
        assert [await cached("b", cache_salt="x"), await cached("")] == [0, 0]


USAGE: dict[bool, dict[str, Any]] = {
    True: {"stream_options": {"include_usage": True}},
    False: {},
}


def num_hits(session: Session) -> int:
    pools = session.statistics().engines.values()
    return sum(load.num_prefix_hits for pool in pools for load in pool)
