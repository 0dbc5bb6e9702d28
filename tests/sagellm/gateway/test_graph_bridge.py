"""All bridges behave alike: the same tests for each, before a session on the null model."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import anyio
import pytest
import trio
from anyio.abc import UNIXSocketStream
from anyio.from_thread import start_blocking_portal

from sagellm import Graph, Sampling, ops
from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.graph_bridge import NOW, GraphBridge, SessionBridge
from sagellm.gateway.processes.gateway_process import GatewayEndpoint
from sagellm.gateway.processes.link import (
    CancelRequest,
    GatewayMessage,
    MessageLink,
    QueryAnswer,
    ToGatewayMessage,
)
from sagellm.gateway.processes.process_bridge import ProcessBridge
from sagellm.gateway.settings import Streaming
from sagellm.gateway.thread_bridge import open_thread_bridge
from sagellm.runtime.engine.engine_server import WINDOW
from sagellm.runtime.messages import Request, TokenEvent
from sagellm.session import Session
from sagellm.session.requests import Timing

STREAMING = Streaming()
SLOW_S = 0.02  # a step; a busy machine is late by fewer of them
# Tokens of one stream that may come in one turn of the loop: a worker sends some steps ahead.
NUM_AT_ONCE = WINDOW if os.environ.get("SAGELLM_TEST_EXECUTOR") == "processes" else 1


class Behind(Protocol):
    """The session of a bridge, from the side of the app."""

    async def do(self, function: Callable[[Session], Awaitable[Any]]) -> Any:
        """Run something in the session's loop."""


Body = Callable[[GraphBridge, Behind], Awaitable[None]]


@asynccontextmanager
async def opened(step_s: float) -> Any:
    """A session whose books balance afterwards, with every block free."""
    options = {"num_blocks": 2048, "decode_step_s": step_s}
    graph = Graph("g").engine("g", device="null", **options) >> ops.generate(engine="g")
    async with graph.open() as session:
        yield session
        await session.executor.idle()
        session.executor.core.ledger.check()
        loads = [load for pool in session.statistics().engines.values() for load in pool]
        assert all(load.num_leased_blocks == 0 for load in loads)


def in_one_loop(body: Body, step_s: float = 0.001) -> None:
    class Here:
        def __init__(self, session: Session) -> None:
            self.session = session

        async def do(self, function: Any) -> Any:
            return await function(self.session)

    async def run() -> None:
        async with opened(step_s) as session:
            await body(SessionBridge(session, STREAMING), Here(session))

    trio.run(run)


def in_another_thread(body: Body, step_s: float = 0.001) -> None:
    with start_blocking_portal(backend="trio") as portal:

        class There:
            def __init__(self, session: Session) -> None:
                self.session = session

            async def do(self, function: Any) -> Any:
                future = portal.start_task_soon(function, self.session)
                return await asyncio.wrap_future(future)

        @asynccontextmanager
        async def whole() -> Any:
            async with opened(step_s) as session, open_thread_bridge(session, STREAMING) as bridge:
                yield session, bridge

        with portal.wrap_async_context_manager(whole()) as (session, bridge):
            asyncio.run(body(bridge, There(session)))


class Awake:
    """A gateway that answers at once."""

    def ask_once(self) -> int:
        return 0

    def has_answered(self, number: int) -> bool:
        return True


@asynccontextmanager
async def at_an_endpoint(session: Session, end: socket.socket) -> Any:
    """The session's side of a link to a gateway elsewhere."""
    async with (
        await UNIXSocketStream.from_socket(end) as stream,
        trio.open_nursery() as nursery,
    ):
        link: MessageLink[GatewayMessage] = MessageLink(stream, GatewayMessage)
        endpoint = GatewayEndpoint(session, STREAMING, set(), link, nursery, Awake())

        async def listen() -> None:
            async for message in link.messages():
                if isinstance(message, CancelRequest):
                    known = endpoint.cancel(message.request_id)
                    link.put(QueryAnswer(message.number, is_known=known))
                else:
                    endpoint.handle(message)  # type: ignore[arg-type]

        nursery.start_soon(link.send)
        nursery.start_soon(listen)
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def before_a_link(end: socket.socket) -> Any:
    """The gateway's side."""
    async with (
        await UNIXSocketStream.from_socket(end) as stream,
        anyio.create_task_group() as tasks,
    ):
        link: MessageLink[ToGatewayMessage] = MessageLink(stream, ToGatewayMessage)
        bridge = ProcessBridge(link, STREAMING)

        async def listen() -> None:
            async for message in link.messages():
                bridge.handle(message)  # type: ignore[arg-type]
            bridge.close()

        tasks.start_soon(link.send)
        tasks.start_soon(listen)
        yield bridge
        tasks.cancel_scope.cancel()


def over_a_link(body: Body, step_s: float = 0.001, backend: str = "trio") -> None:
    here, there = socket.socketpair()
    with start_blocking_portal(backend="trio") as portal:

        class There:
            def __init__(self, session: Session) -> None:
                self.session = session

            async def do(self, function: Any) -> Any:
                return await anyio.to_thread.run_sync(portal.call, function, self.session)

        @asynccontextmanager
        async def whole() -> Any:
            async with opened(step_s) as session, at_an_endpoint(session, here):
                yield session

        async def run(session: Session) -> None:
            async with before_a_link(there) as bridge:
                await body(bridge, There(session))

        with portal.wrap_async_context_manager(whole()) as session:
            anyio.run(run, session, backend=backend)


def over_a_link_on_asyncio(body: Body, step_s: float = 0.001) -> None:
    over_a_link(body, step_s, "asyncio")


@pytest.fixture(params=[in_one_loop, in_another_thread, over_a_link, over_a_link_on_asyncio])
def behind(request: pytest.FixtureRequest) -> Callable[..., None]:
    return request.param


def asked(request_id: str = "r", *, max_tokens: int = 40, prompt: Any = (1, 2), **fields: Any):
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True, n=fields.pop("n", 1))
    return Request(
        request_id=request_id,
        prompt="ab",
        prompt_token_ids=tuple(prompt),
        sampling=sampling,
        **fields,
    )


async def read(bridge: GraphBridge, request: Request, timing: Timing = NOW) -> list[TokenEvent]:
    async with bridge.open_stream(request, timing) as batches:
        return await rest(batches)


async def rest(batches: Any) -> list[TokenEvent]:
    found: list[TokenEvent] = []
    async for batch in batches:
        assert batch
        found += batch
    return found


def num_tokens(events: Sequence[TokenEvent]) -> int:
    return sum(len(event.token_ids) for event in events)


async def idle(session: Session) -> None:
    await session.executor.idle()


async def ended(session: Session) -> Any:
    await session.executor.idle()
    return dict(session.executor.core.ledger.ended)


async def num_computed(session: Session) -> Any:
    return session.executor.core.ledger.num_tokens


def test_every_token_comes_in_order_and_one_event_is_the_last(behind):
    async def body(bridge: GraphBridge, _: Behind) -> None:
        events = await read(bridge, asked())
        positions = [event.position for event in events if event.token_ids]
        assert positions == list(range(40))
        assert [event.finish_reason for event in events if event.is_last] == ["length"]
        assert events[-1].is_last
        assert events[0].num_prompt_tokens == 2

    behind(body)


def test_choices_come_through_one_asked(behind):
    async def body(bridge: GraphBridge, _: Behind) -> None:
        events = await read(bridge, asked(n=3))
        last = [event.choice for event in events if event.is_last]
        assert sorted(last) == [0, 1, 2]
        assert num_tokens(events) == 120

    behind(body)


def test_the_facts_of_an_entry_reach_the_graph(behind):
    class Seen:
        def submitted(self, requests: Any) -> None:
            self.request = requests[0]

        def delivered(self, item: Any) -> None:
            pass

    async def body(bridge: GraphBridge, there: Behind) -> None:
        seen = Seen()

        async def observe(session: Session) -> None:
            session.observers.append(seen)

        await there.do(observe)
        facts = {"user_id": "t", "model": "m", "salt": "s", "priority": 1, "slo_ttft_s": 2.5}
        facts["no_queue"] = True
        tags = {"traceparent": "00-a-b-01"}
        await read(bridge, asked(**facts, tags=tags), Timing(timeout_s=90.0))
        request = seen.request
        assert (request.prompt, request.prompt_token_ids) == ("ab", (1, 2))
        assert (request.user_id, request.model, request.salt) == ("t", "m", "s")
        assert (request.priority, request.slo_ttft_s, request.no_queue) == (1, 2.5, True)
        assert request.tags["traceparent"] == "00-a-b-01"
        assert request.expires_s - request.stamps.arrived_s == pytest.approx(90)

    behind(body)


def test_leaving_cancels(behind):
    async def body(bridge: GraphBridge, there: Behind) -> None:
        async with bridge.open_stream(asked(max_tokens=4000)) as batches:
            await anext(batches)
        assert await there.do(ended) == {"cancelled": 1}
        assert await there.do(num_computed) < STREAMING.num_buffered_tokens / 2

    behind(body, SLOW_S)


def test_being_cancelled_while_it_waits_cancels(behind):
    async def body(bridge: GraphBridge, there: Behind) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read, bridge, asked(max_tokens=8000))
            await read(bridge, asked("other", max_tokens=2))
            tasks.cancel_scope.cancel()
        assert await there.do(ended) == {"length": 1, "cancelled": 1}
        assert await there.do(num_computed) < STREAMING.num_buffered_tokens / 2

    behind(body, SLOW_S)


def test_leaving_at_once_leaves_nothing_behind(behind):
    async def body(bridge: GraphBridge, there: Behind) -> None:
        for number in range(20):
            async with bridge.open_stream(asked(f"r{number}", max_tokens=4000)):
                pass
        await there.do(idle)

    behind(body)


def test_what_is_not_read_is_bounded_and_its_request_ended(behind):
    async def body(bridge: GraphBridge, there: Behind) -> None:
        async with bridge.open_stream(asked(max_tokens=4000)) as batches:
            first = list(await anext(batches))
            assert await there.do(ended) == {"cancelled": 1}
            events = await rest(batches)
        assert events[-1].finish_reason == "cancelled"
        assert events[-1].code == "slow_reader"
        assert STREAMING.num_buffered_tokens / 2 < num_tokens(events)
        assert num_tokens(events) <= STREAMING.num_buffered_tokens + NUM_AT_ONCE
        positions = [event.position for event in first + events if event.token_ids]
        assert positions == list(range(len(positions)))

    behind(body)


def test_a_reader_that_is_late_but_within_the_limits_gets_all(behind):
    async def body(bridge: GraphBridge, there: Behind) -> None:
        num = STREAMING.num_buffered_tokens // 2
        async with bridge.open_stream(asked(max_tokens=num)) as batches:
            first = list(await anext(batches))
            await there.do(idle)
            events = first + await rest(batches)
        assert [event.position for event in events if event.token_ids] == list(range(num))
        assert events[-1].finish_reason == "length"

    behind(body)


def test_a_request_is_ended_from_outside(behind):
    async def body(bridge: GraphBridge, there: Behind) -> None:
        async with bridge.open_stream(asked(max_tokens=8000)) as batches:
            await anext(batches)
            assert await bridge.cancel("r")
            events = await rest(batches)
        assert events[-1].finish_reason == "cancelled"
        await there.do(idle)
        assert not await bridge.cancel("r")
        assert not await bridge.cancel("never heard of")

    behind(body, SLOW_S)


def test_many_at_once(behind):
    async def body(bridge: GraphBridge, there: Behind) -> None:
        found: dict[str, int] = {}

        async def ask(name: str) -> None:
            found[name] = num_tokens(await read(bridge, asked(name)))

        async with anyio.create_task_group() as tasks:
            for number in range(60):
                tasks.start_soon(ask, f"r{number}")
        assert set(found.values()) == {40}
        assert len(found) == 60

    behind(body)


def test_what_no_session_takes_is_a_refusal(behind):
    async def body(bridge: GraphBridge, _: Behind) -> None:
        with pytest.raises(ApiError, match="empty") as caught:
            await read(bridge, asked(prompt=()))
        assert caught.value.status == 400

    behind(body)


def test_a_session_that_closes_ends_its_readers(behind):
    async def body(bridge: GraphBridge, there: Behind) -> None:
        async with bridge.open_stream(asked(max_tokens=8000)) as batches:
            await anext(batches)

            async def close(session: Session) -> None:
                await session.close()

            await there.do(close)
            events = await rest(batches)
        assert events[-1].finish_reason == "cancelled"
        assert events[-1].code in ("shutting_down", "slow_reader")

    behind(body)


@pytest.mark.parametrize("behind", [in_one_loop, in_another_thread])
def test_two_requests_of_one_name_are_not_let_in(behind):
    async def body(bridge: GraphBridge, _: Behind) -> None:
        async with bridge.open_stream(asked(max_tokens=8000)) as batches:
            await anext(batches)
            with pytest.raises(ApiError):
                await read(bridge, asked())

    behind(body, SLOW_S)


@pytest.mark.parametrize("behind", [over_a_link, over_a_link_on_asyncio])
def test_over_a_link_they_are_two(behind):
    """The names are those of a gateway, of which there may be several; none sees another's."""

    async def body(bridge: GraphBridge, there: Behind) -> None:
        async with bridge.open_stream(asked(max_tokens=4000)) as batches:
            await anext(batches)
            events = await read(bridge, asked(max_tokens=5))
            assert num_tokens(events) == 5
        assert await there.do(ended) == {"length": 1, "cancelled": 1}

    behind(body, SLOW_S)
