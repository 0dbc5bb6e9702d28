"""The engine port over a channel: as in one process, and after a loss of the worker."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from engine_driver import Driver
from remote_engines import PROMPT, Pair, live, open_null, sequence
from trio.testing import MockClock, wait_all_tasks_blocked

from sagellm.runtime.comm.channel import memory_channels
from sagellm.runtime.engine.engine_server import WINDOW, EngineServer
from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.runtime.engine.remote_kv import RemoteKVEngine, RemoteSource, RemoteTarget
from sagellm.runtime.engine.worker_calls import LEASE_S
from sagellm.runtime.messages import LeaseRef
from sagellm.runtime.port import (
    EngineLost,
    EngineRefusal,
    LeaseOffer,
    Lost,
    PrefillDone,
    StaleLease,
)


@asynccontextmanager
async def served(*locals_: LocalEngine) -> AsyncIterator[list[Pair]]:
    pairs = []
    async with trio.open_nursery() as nursery:
        for local in locals_:
            remote = RemoteKVEngine(local.facts, name=local.name)
            pairs.append(Pair(remote, local, live(remote, local, nursery)))
        await wait_all_tasks_blocked()
        yield pairs
        nursery.cancel_scope.cancel()
    for local in locals_:
        local.pool.check()
        assert local.pool.num_leased == 0


def offer(pair: Pair, **fields: Any) -> LeaseOffer:
    known = {"request_id": "r", "choice": 0, "epoch": 0, "num_tokens": len(PROMPT)}
    return LeaseOffer(**{**known, "layout_hash": pair.local.facts.layout_hash, **fields})


async def test_an_answer_comes_as_from_the_engine_itself(autojump_clock: MockClock) -> None:
    async with served(open_null()) as [pair], trio.open_nursery() as nursery:
        driver = Driver(pair.remote)
        nursery.start_soon(driver.read)
        replies = [await driver.submit(f"r{n}", PROMPT, max_tokens=30) for n in range(4)]
        await driver.all_done()
        nursery.cancel_scope.cancel()
    assert [len(reply.token_ids) for reply in replies] == [30] * 4
    assert all(reply.last and reply.last.finish_reason == "length" for reply in replies)


async def test_a_cancelled_sequence_ends_once(autojump_clock: MockClock) -> None:
    async with served(open_null()) as [pair], trio.open_nursery() as nursery:
        driver = Driver(pair.remote)
        nursery.start_soon(driver.read)
        reply = await driver.submit("r", PROMPT, max_tokens=1000)
        await trio.sleep(1)
        pair.remote.cancel("r", 0, 0)
        await driver.all_done()
        await pair.remote.idle()
        assert pair.remote.load.num_leased_blocks == 0
        nursery.cancel_scope.cancel()
    assert reply.last is not None
    assert reply.last.finish_reason == "cancelled"


async def test_what_the_engine_refuses_is_raised_here(autojump_clock: MockClock) -> None:
    async with served(open_null(max_model_len=64)) as [pair]:
        with pytest.raises(EngineRefusal) as refused:
            await pair.remote.submit(sequence(prompt_token_ids=PROMPT * 2))
        assert refused.value.code == "bad_request"
        with pytest.raises(StaleLease):
            await pair.remote.submit(sequence(lease=stale(pair)))
        with pytest.raises(EngineRefusal, match="layout"):
            await pair.remote.import_(offer(pair, layout_hash="other"))


def stale(pair: Pair) -> LeaseRef:
    return LeaseRef(
        engine="e", replica=0, lease_id=9, request_id="r", choice=0, epoch=0, num_tokens=8
    )


async def test_a_slow_reader_holds_up_its_own_sequences_only(autojump_clock: MockClock) -> None:
    async with served(open_null(decode_step_s=0.01)) as [pair]:
        await pair.remote.submit(sequence(max_tokens=400))
        await trio.sleep(60)
        num_steps = pair.local.load.num_steps
        assert 0 < num_steps <= 3 * WINDOW  # under way, in the mailbox, and one being computed
        async with trio.open_nursery() as nursery:
            other = Driver(pair.remote, "other")
            nursery.start_soon(other.read)
            await other.submit("o", PROMPT, max_tokens=50)
            with trio.fail_after(5):
                await other.all_done()
            nursery.cancel_scope.cancel()
        num_tokens = 0
        async for events in pair.remote.events("test"):
            num_tokens += sum(len(event.token_ids) for event in events)  # type: ignore[union-attr]
            if num_tokens == 400:
                break


async def test_blocks_are_handed_over_between_workers(autojump_clock: MockClock) -> None:
    async with served(open_null("p"), open_null("d")) as [left, right]:
        async with trio.open_nursery() as nursery:
            prefill, decode = Driver(left.remote), Driver(right.remote)
            nursery.start_soon(prefill.read)
            nursery.start_soon(decode.read)
            target = await right.remote.import_(offer(right))
            assert (await right.remote.import_(offer(right))).lease == target.lease
            held = await prefill.submit("r", PROMPT, hold_kv=True)
            await held.done.wait()
            assert held.lease is not None
            source = left.remote.export(held.lease)
            await target.receive(source)
            source.release()
            reply = await decode.submit(
                "r", PROMPT, emitted_token_ids=tuple(held.token_ids), lease=target.lease
            )
            await reply.done.wait()
            await left.remote.idle()
            await right.remote.idle()
            nursery.cancel_scope.cancel()
        assert len(held.token_ids) + len(reply.token_ids) == 16
        assert left.remote.load.num_leased_blocks == right.remote.load.num_leased_blocks == 0


@asynccontextmanager
async def transferring(
    **options: Any,
) -> AsyncIterator[tuple[Pair, Pair, RemoteSource, RemoteTarget]]:
    """Two engines, the export of a computed prompt in one, and its target in the other."""
    async with (
        served(open_null("p", **options), open_null("d", **options)) as [left, right],
        trio.open_nursery() as nursery,
    ):
        prefill = Driver(left.remote)
        nursery.start_soon(prefill.read)
        target = await right.remote.import_(offer(right))
        held = await prefill.submit("r", PROMPT, hold_kv=True)
        await held.done.wait()
        assert held.lease is not None
        yield left, right, left.remote.export(held.lease), target
        nursery.cancel_scope.cancel()


async def test_a_transfer_that_is_cancelled_frees_both_sides(autojump_clock: MockClock) -> None:
    slow = {"kv_bytes_per_s": 1.0}
    async with transferring(**slow) as (left, right, source, target):
        with trio.move_on_after(1):
            await target.receive(source)
        assert left.local.pool.num_leased > 0  # until it is released
        source.release()
        await left.remote.idle()
        await right.remote.idle()
        assert left.local.pool.num_leased == right.local.pool.num_leased == 0


async def test_an_exported_lease_that_nobody_acknowledges_ends(autojump_clock: MockClock) -> None:
    async with served(open_null("p")) as [pair], trio.open_nursery() as nursery:
        driver = Driver(pair.remote)
        nursery.start_soon(driver.read)
        held = await driver.submit("r", PROMPT, hold_kv=True)
        await held.done.wait()
        assert held.lease is not None
        await pair.remote.export(held.lease).locate()
        pair.remote.cancel("r", 0, 0)
        await trio.sleep(LEASE_S - 0.1)
        assert pair.local.pool.num_leased > 0  # a receiver may be reading them
        await trio.sleep(0.2)
        assert pair.local.pool.num_leased == 0
        nursery.cancel_scope.cancel()


async def test_a_transfer_may_take_longer_than_a_lease(autojump_clock: MockClock) -> None:
    slow = {"kv_bytes_per_s": open_null().facts.kv_block_bytes / 40}  # one block: forty seconds
    async with transferring(**slow) as (left, right, source, target):
        begun_s = trio.current_time()
        await target.receive(source)
        assert trio.current_time() - begun_s > 3 * LEASE_S
        assert left.local.pool.num_leased > 0
        source.release()
        target.abort()
        await left.remote.idle()
        await right.remote.idle()


async def test_an_import_that_is_cancelled_leaves_no_block(autojump_clock: MockClock) -> None:
    full = open_null("d", num_blocks=4, max_model_len=64)
    async with served(full) as [pair]:
        await pair.remote.import_(offer(pair, num_tokens=60))
        with trio.move_on_after(1) as scope:
            await pair.remote.import_(offer(pair, request_id="s", num_tokens=60))
        assert scope.cancelled_caught
        pair.remote.cancel("r", 0, 0)
        await pair.remote.idle()
        assert pair.local.pool.num_leased == 0


async def test_a_loss_ends_all_that_was_open(autojump_clock: MockClock) -> None:
    changes: list[bool] = []
    small = open_null(num_blocks=4, max_model_len=64, decode_step_s=1.0)
    async with served(small) as [pair]:
        pair.remote._on_change = changes.append
        await pair.remote.submit(sequence("a"))
        await trio.sleep(3.5)
        read = pair.remote.events("test")
        seen: list[Any] = []
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def wait() -> None:
                with pytest.raises(EngineLost):
                    await pair.remote.import_(offer(pair, request_id="i"))

            await trio.sleep(0.1)
            pair.lose()
        with trio.move_on_after(1):
            async for events in read:
                seen += events
        assert seen[-1] == Lost(request_id="a", choice=0, epoch=0, cause="link")
        assert sum(isinstance(event, Lost) for event in seen) == 1
        assert changes == [False]
        assert pair.remote.is_lost
        with pytest.raises(EngineLost):
            await pair.remote.submit(sequence("c"))
        pair.remote.cancel("a", 0, 0)
        await pair.remote.idle()


@pytest.mark.parametrize("num_turns", range(10))
@pytest.mark.parametrize("ends", ["lost", "evicted"])
async def test_a_caller_that_submits_during_a_loss_hears_of_it_once(
    ends: str, num_turns: int, autojump_clock: MockClock
) -> None:
    async with served(open_null()) as [pair], trio.open_nursery() as nursery:
        heard: list[Any] = []

        async def submit() -> None:
            try:
                await pair.remote.submit(sequence(max_tokens=50))
            except EngineLost:
                heard.append("raised")

        async def read() -> None:
            async for events in pair.remote.events("test"):
                heard.extend(event for event in events if isinstance(event, Lost))
                heard.extend(event.finish_reason for event in events if is_last(event))

        nursery.start_soon(submit)
        nursery.start_soon(read)
        for _ in range(num_turns):
            await trio.lowlevel.checkpoint()
        (pair.lose if ends == "lost" else pair.remote.evict)()
        await trio.sleep(10)
        assert len(heard) == 1
        assert heard != ["cancelled"]
        nursery.cancel_scope.cancel()


def is_last(event: Any) -> bool:
    return getattr(event, "finish_reason", None) is not None


async def test_only_an_engine_that_was_asked_may_have_died_of_it(autojump_clock: MockClock) -> None:
    async with served(open_null()) as [pair], trio.open_nursery() as nursery:

        @nursery.start_soon
        async def submit() -> None:
            with pytest.raises(EngineLost) as lost:
                await pair.remote.submit(sequence())
            assert lost.value.cause == "link"

        pair.channel._peer._take = lambda message: None  # type: ignore[method-assign]  # no answer
        await wait_all_tasks_blocked()
        pair.lose()
        await wait_all_tasks_blocked()
        with pytest.raises(EngineLost) as lost:
            await pair.remote.submit(sequence())
        assert lost.value.cause == "none"


async def test_a_life_that_is_ended_from_outside_is_a_death(autojump_clock: MockClock) -> None:
    local = open_null()
    remote = RemoteKVEngine(local.facts, name="e")
    seen: list[Any] = []
    here, there = memory_channels()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(EngineServer(local, there).run)

        @nursery.start_soon
        async def read() -> None:
            async for events in remote.events("test"):
                seen.extend(events)

        async with trio.open_nursery() as life:
            life.start_soon(remote.live, here)
            await wait_all_tasks_blocked()
            await remote.submit(sequence(max_tokens=1000))
            await trio.sleep(1)
            life.cancel_scope.cancel()
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert seen[-1] == Lost(request_id="r", choice=0, epoch=0, cause="death")


async def test_what_was_read_late_asks_nothing_of_the_next_life(autojump_clock: MockClock) -> None:
    async with served(open_null(decode_step_s=0.01)) as [pair], trio.open_nursery() as nursery:
        await pair.remote.submit(sequence(max_tokens=1000))
        await trio.sleep(5)  # no reader: batches wait
        pair.lose()
        await wait_all_tasks_blocked()
        live(pair.remote, open_null(), nursery)
        await wait_all_tasks_blocked()
        events = pair.remote.events("test")
        while not isinstance((await events.__anext__())[0], Lost):
            pass
        driver = Driver(pair.remote, "other")
        nursery.start_soon(driver.read)
        reply = await driver.submit("r", PROMPT, max_tokens=5)
        await reply.done.wait()
        assert len(reply.token_ids) == 5
        nursery.cancel_scope.cancel()


async def test_what_is_evicted_is_lost_here_and_cancelled_there(autojump_clock: MockClock) -> None:
    """Evict again and again: no reader takes later events, and their credit comes back."""
    async with served(open_null(decode_step_s=0.01)) as [pair], trio.open_nursery() as nursery:
        seen: list[Any] = []

        @nursery.start_soon
        async def read() -> None:
            async for events in pair.remote.events("test"):
                seen.extend(events)

        for epoch in range(3 * WINDOW):
            await pair.remote.submit(sequence(epoch=epoch, max_tokens=1000))
            await trio.sleep(1)
            pair.remote.evict()
            await pair.remote.idle()
            assert pair.remote.load.num_leased_blocks == 0
            assert seen[-1] == Lost(request_id="r", choice=0, epoch=epoch, cause="none")
        await pair.remote.submit(sequence("last", max_tokens=50))
        await trio.sleep(5)
        assert seen[-1].finish_reason == "length"
        nursery.cancel_scope.cancel()


async def test_another_life_begins_empty(autojump_clock: MockClock) -> None:
    async with served(open_null()) as [pair], trio.open_nursery() as nursery:
        await pair.remote.submit(sequence("a", max_tokens=1000))
        pair.lose()
        await wait_all_tasks_blocked()
        second = open_null()
        live(pair.remote, second, nursery)
        await wait_all_tasks_blocked()
        driver = Driver(pair.remote, "again")
        nursery.start_soon(driver.read)
        reply = await driver.submit("a", PROMPT, max_tokens=5)
        await reply.done.wait()
        assert len(reply.token_ids) == 5
        nursery.cancel_scope.cancel()


async def test_a_lease_of_an_earlier_life_is_stale(autojump_clock: MockClock) -> None:
    async with served(open_null("p")) as [pair], trio.open_nursery() as nursery:
        await pair.remote.submit(sequence(hold_kv=True))
        done = (await pair.remote.events("test").__anext__())[0]
        assert isinstance(done, PrefillDone)
        assert done.lease is not None
        pair.lose()
        await wait_all_tasks_blocked()
        live(pair.remote, open_null("p"), nursery)
        await wait_all_tasks_blocked()
        with pytest.raises(StaleLease):
            await pair.remote.export(done.lease).locate()
        nursery.cancel_scope.cancel()
