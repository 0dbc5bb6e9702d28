"""Engines report their prefix blocks: in this process, and over a channel to a worker."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from engine_driver import Driver
from remote_engines import Pair, live, open_null
from trio.testing import MockClock, wait_all_tasks_blocked

from sagellm.runtime.comm.protocol import CacheUpdate, Events
from sagellm.runtime.engine import engine_server
from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.runtime.engine.remote_engine import RemoteEngine
from sagellm.runtime.kv import cache_log
from sagellm.runtime.prefixes import CacheChanged, OnCacheChanged, ReportsCache, hashes_in


class Heard:
    """The prefix blocks of one engine, as a graph knows them."""

    def __init__(self) -> None:
        self.reports: list[CacheChanged] = []
        self.blocks: set[bytes] = set()

    def __call__(self, changed: CacheChanged) -> None:
        if changed.is_first:
            self.blocks.clear()
        else:
            last = self.reports[-1]
            assert (changed.epoch, changed.sequence) == (last.epoch, last.sequence + 1)
        self.reports.append(changed)
        self.blocks |= set(hashes_in(changed.stored))
        self.blocks -= set(hashes_in(changed.dropped))

    @property
    def num_first(self) -> int:
        return sum(changed.is_first for changed in self.reports)


def blocks_of(engine: LocalEngine) -> set[bytes]:
    return set(engine.pool._tree.hashes)


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[tuple[Pair, trio.Nursery]]:
    local = open_null(**{"num_blocks": 16, "block_size": 4, "max_model_len": 64, **options})
    remote = RemoteEngine(local.facts, name="e", replica=3)
    async with trio.open_nursery() as nursery:
        pair = Pair(remote, local, live(remote, local, nursery))
        await wait_all_tasks_blocked()
        yield pair, nursery
        nursery.cancel_scope.cancel()


async def answer(pair: Pair, nursery: trio.Nursery, *prompts: int) -> None:
    """Answers to prompts of 40 equal tokens."""
    driver = Driver(pair.remote)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as reading:
            reading.start_soon(driver.read)
            for token in prompts:
                await driver.submit(f"r{token}", (token,) * 40, max_tokens=10)
                await driver.all_done()
            scope.cancel()


async def test_a_graph_knows_what_a_worker_has(autojump_clock: MockClock) -> None:
    async with running() as (pair, nursery):
        heard = Heard()
        pair.remote.report_cache(heard)
        await answer(pair, nursery, 1, 2, 3)
        await wait_all_tasks_blocked()
        assert pair.local.pool.num_evicted > 0
        assert heard.blocks == blocks_of(pair.local) != set()
        assert {(one.engine, one.replica, one.epoch) for one in heard.reports} == {("e", 3, 1)}
        assert heard.num_first == 1


async def test_a_step_sends_one_report_at_most(autojump_clock: MockClock) -> None:
    async with running(num_blocks=64, max_num_seqs=4) as (pair, nursery):
        heard = Heard()
        pair.remote.report_cache(heard)
        await answer(pair, nursery, 1)
        assert max(len(one.stored) // 8 for one in heard.reports) == 10  # the prompt's, at once
        assert len(heard.reports) <= 1 + pair.local.load.num_steps


async def test_nothing_is_sent_before_anybody_asks(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[object] = []
    async with running() as (pair, nursery):
        hear = pair.remote._take
        monkeypatch.setattr(pair.remote, "_take", lambda said: (sent.append(said), hear(said)))
        await answer(pair, nursery, 1)
        assert pair.local.pool._tree.log is None
    kinds = set(map(type, sent))
    assert Events in kinds
    assert CacheUpdate not in kinds


async def test_a_late_reader_is_told_all_in_pieces(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_log, "MAX_REPORTED", 2)
    async with running() as (pair, nursery):
        await answer(pair, nursery, 1)
        heard = Heard()
        pair.remote.report_cache(heard)
        await wait_all_tasks_blocked()
        assert heard.blocks == blocks_of(pair.local)
        assert len(heard.reports) == len(heard.blocks) // 2 > engine_server.WINDOW


async def test_a_graph_that_does_not_read_makes_a_worker_begin_anew(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_log, "MAX_PENDING", 6)
    async with running() as (pair, nursery):
        heard = Heard()
        unsaid: list[object] = []
        say = pair.remote.calls.say
        monkeypatch.setattr(
            pair.remote.calls,
            "say",
            lambda said: (
                unsaid.append(said) if type(said).__name__ == "GrantCacheUpdate" else say(said)
            ),
        )
        pair.remote.report_cache(heard)
        await answer(pair, nursery, 1, 2, 3)
        assert len(heard.reports) == engine_server.WINDOW
        monkeypatch.undo()
        for grant in unsaid:
            pair.remote.calls.say(grant)  # type: ignore[arg-type]
        await wait_all_tasks_blocked()
        assert heard.blocks == blocks_of(pair.local)
        assert heard.num_first >= 2


async def test_a_new_life_is_asked_anew(autojump_clock: MockClock) -> None:
    async with running() as (pair, nursery):
        heard = Heard()
        pair.remote.report_cache(heard)
        await answer(pair, nursery, 1)
        pair.lose()
        await wait_all_tasks_blocked()
        second = open_null(num_blocks=16, block_size=4, max_model_len=64)
        live(pair.remote, second, nursery)
        await wait_all_tasks_blocked()
        pair.remote.report_cache(heard)
        await wait_all_tasks_blocked()
        assert heard.blocks == set()
        assert heard.reports[-1].epoch == 2


async def test_an_engine_here_tells_as_well(autojump_clock: MockClock) -> None:
    local = open_null(num_blocks=16, block_size=4, max_model_len=64)
    assert isinstance(local, ReportsCache)
    heard = Heard()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(local.run)
        local.report_cache(heard)
        driver = Driver(local)
        nursery.start_soon(driver.read)
        await driver.submit("r", (1,) * 40, max_tokens=10)
        await driver.all_done()
        assert heard.blocks == blocks_of(local) != set()
        nursery.cancel_scope.cancel()


class ReportingKind:
    """An engine of another kind, which reports to a function and keeps no log."""

    def __init__(self, local: LocalEngine) -> None:
        self._local = local
        self._tell: OnCacheChanged = lambda changed: None
        self._num_reports = 0

    def __getattr__(self, name: str) -> Any:
        if name == "cache":
            raise AttributeError(name)
        return getattr(self._local, name)

    def report_cache(self, tell: OnCacheChanged) -> None:
        self._tell = tell
        self.report(b"one-----" + b"two-----", is_first=True)

    def report(self, stored: bytes, dropped: bytes = b"", *, is_first: bool = False) -> None:
        self._num_reports += 1
        self._tell(
            CacheChanged(
                engine="e",
                replica=0,
                epoch=1,
                sequence=self._num_reports,
                is_first=is_first,
                stored=stored,
                dropped=dropped,
            )
        )


async def test_a_graph_knows_what_a_worker_of_another_kind_has(autojump_clock: MockClock) -> None:
    other = ReportingKind(open_null())
    remote = RemoteEngine(other.facts, name="e", replica=3)
    heard = Heard()
    async with trio.open_nursery() as nursery:
        live(remote, other, nursery)  # type: ignore[arg-type]
        await wait_all_tasks_blocked()
        remote.report_cache(heard)
        await wait_all_tasks_blocked()
        assert heard.blocks == {b"one-----", b"two-----"}
        other.report(b"three---", dropped=b"one-----")
        await wait_all_tasks_blocked()
        assert heard.blocks == {b"two-----", b"three---"}
        other.report(b"four----", is_first=True)
        await wait_all_tasks_blocked()
        assert heard.blocks == {b"four----"}
        assert heard.num_first == 2
        nursery.cancel_scope.cancel()
