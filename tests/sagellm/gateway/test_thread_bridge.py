"""The bridge between two threads: wake-ups, threads and closing."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import trio
from anyio.from_thread import start_blocking_portal

from sagellm import Graph, Sampling, ops
from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.settings import Streaming
from sagellm.gateway.thread_bridge import ThreadBridge, open_thread_bridge
from sagellm.runtime.messages import Request

PROMPT = {"prompt": "a", "prompt_token_ids": (1,)}
LONG = Sampling(max_tokens=100, ignore_eos=True)


class Portal:
    """A session and its bridge in a trio thread, for a plain thread."""

    def __enter__(self) -> "Portal":
        self._context = start_blocking_portal(backend="trio")
        self.portal = self._context.__enter__()
        self._stop: Any = None
        self._closed: Any = None
        self.bridge: ThreadBridge = self.portal.start_task(self._run)[1]
        return self

    async def _run(self, *, task_status: Any) -> None:
        options = {"num_blocks": 2048, "decode_step_s": 0.001}
        graph = Graph("g").engine("g", device="null", **options) >> ops.generate(engine="g")
        self._stop, self._closed = trio.Event(), trio.Event()
        async with graph.open() as session:
            async with open_thread_bridge(session, Streaming()) as bridge:
                task_status.started(bridge)
                await self._stop.wait()
            self._closed.set()
            await session.executor.idle()
            session.executor.core.ledger.check()

    def close(self) -> None:
        """Close the bridge, and then the graph."""
        self.portal.call(self._stop.set)
        self.portal.call(self._closed.wait)

    def __exit__(self, *error: Any) -> None:
        self.close()
        self._context.__exit__(*error)


def asked(name: str, sampling: Sampling = LONG) -> Request:
    return Request(request_id=name, sampling=sampling, **PROMPT)


async def read(bridge: ThreadBridge, name: str) -> Sequence[Any]:
    async with bridge.open_stream(asked(name)) as batches:
        return [event async for batch in batches for event in batch]


def test_what_one_step_yields_wakes_the_loop_once():
    async def ask(bridge: ThreadBridge) -> tuple[int, int]:
        loop, calls = asyncio.get_running_loop(), []
        original = loop.call_soon_threadsafe

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return original(*args, **kwargs)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        found = await asyncio.gather(*(read(bridge, f"r{number}") for number in range(16)))
        return len(calls), sum(map(len, found))

    with Portal() as portal:
        num_calls, num_events = asyncio.run(ask(portal.bridge))
    assert num_events == 1600
    assert num_calls < num_events / 4


def test_no_thread_is_started_for_a_request():
    async def ask(bridge: ThreadBridge) -> int:
        await asyncio.gather(*(read(bridge, f"r{number}") for number in range(16)))
        return threading.active_count()

    with Portal() as portal:
        before = threading.active_count()
        assert asyncio.run(ask(portal.bridge)) == before


def test_closing_the_bridge_ends_its_readers():
    async def ask(portal: Portal) -> None:
        sampling = Sampling(max_tokens=8000, ignore_eos=True)
        async with portal.bridge.open_stream(asked("r", sampling)) as batches:
            await anext(batches)
            portal.close()
            with pytest.raises(ApiError) as caught:
                async for _ in batches:
                    pass
        assert caught.value.code == "shutting_down"

    with Portal() as portal:
        asyncio.run(ask(portal))


def test_a_bridge_whose_thread_has_ended_takes_nothing():
    async def ask(bridge: ThreadBridge) -> None:
        with pytest.raises(ApiError) as caught:
            await read(bridge, "r")
        assert caught.value.status == 503
        with pytest.raises(ApiError):
            await bridge.cancel("r")

    with Portal() as portal:
        bridge = portal.bridge
    asyncio.run(ask(bridge))


def test_a_closed_bridge_takes_nothing():
    async def ask(portal: Portal) -> None:
        portal.close()
        with pytest.raises(ApiError) as caught:
            await read(portal.bridge, "r")
        assert caught.value.code == "shutting_down"

    with Portal() as portal:
        asyncio.run(ask(portal))


def test_a_loop_that_closes_in_the_middle_harms_nobody():
    async def ask(bridge: ThreadBridge) -> None:
        await bridge.open_stream(
            asked("r", Sampling(max_tokens=8000, ignore_eos=True))
        ).__aenter__()

    with Portal() as portal:
        asyncio.run(ask(portal.bridge))  # and the reader is gone, without a word
