"""Blocks that come while the rest of their prompt is computed, and what spoils that."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from remote_engines import Pair, live, open_null, sequence
from trio.testing import MockClock, wait_all_tasks_blocked

from sagellm.runtime.engine import layer_watch
from sagellm.runtime.engine.local import LocalEngine
from sagellm.runtime.engine.port import (
    DamagedBlocks,
    EngineLost,
    LeaseOffer,
    PrefillDone,
    StaleLease,
)
from sagellm.runtime.engine.prefetching import Prefetcher
from sagellm.runtime.engine.remote import RemoteEngine
from sagellm.runtime.kv.extent import Part
from sagellm.runtime.kv.storage import NullStorage
from sagellm.runtime.kv.transfer import PoolTarget
from sagellm.runtime.messages import LeaseRef

NUM_TOKENS, STEP = 200, 32  # a prompt of 13 blocks in 7 steps, two blocks each
NUM_BLOCKS, NUM_EARLY = 13, 12
BLOCK_S = 1e-3  # to copy one; a step takes 32 ms, and says once, between, that half is done
NUM_LAYERS = 8
PROMPT = tuple(n % 250 for n in range(NUM_TOKENS))


@dataclass
class Couple:
    """Who computes prompts, and who decodes them; `copied`: blocks and layers of each copy."""

    prefill: Pair
    decode: Pair
    prefetcher: Prefetcher
    copied: list[tuple[int, range]]

    @property
    def num_copied(self) -> float:
        """Blocks, with all their layers."""
        return sum(blocks * len(layers) / NUM_LAYERS for blocks, layers in self.copied)

    async def reserve(self) -> Any:
        facts = self.prefill.local.facts
        return await self.decode.remote.import_(
            LeaseOffer(
                request_id="r",
                choice=0,
                epoch=0,
                num_tokens=NUM_TOKENS,
                layout_hash=facts.layout_hash,
            )
        )

    async def begin(self) -> None:
        await self.prefill.remote.submit(sequence(prompt_token_ids=PROMPT, hold_kv=True))

    async def computed(self, request_id: str = "r") -> LeaseRef:
        """The lease of its prompt, once it is computed."""
        async for events in self.prefill.remote.events("test"):
            for event in events:
                if isinstance(event, PrefillDone) and event.first.request_id == request_id:
                    assert event.lease is not None
                    return event.lease
        raise AssertionError("it never was")

    def adopted_by(self, lease: LeaseRef) -> Any:
        return sequence(prompt_token_ids=PROMPT, emitted_token_ids=(1,), lease=lease)


@asynccontextmanager
async def couple(
    monkeypatch: pytest.MonkeyPatch, *, least_part_bytes: int = 2**40, step: int = STEP
) -> AsyncIterator[Couple]:
    copied: list[tuple[int, range]] = []
    fetch = NullStorage.fetch

    async def noted(self: NullStorage, source: Any, blocks: Any, layers: range, check: Any) -> None:
        await fetch(self, source, blocks, layers, check)
        copied.append((len(blocks), layers))

    monkeypatch.setattr(NullStorage, "fetch", noted)
    monkeypatch.setattr(layer_watch, "LEAST_PART_BYTES", least_part_bytes)
    options: dict[str, Any] = {"max_step_tokens": step, "prefill_token_s": 1e-3}
    options |= {"max_model_len": 300}
    locals_ = [open_null(name, **options) for name in ("p", "d")]
    bytes_per_s = locals_[0].facts.kv_block_bytes / BLOCK_S
    locals_ = [open_null(one.name, kv_bytes_per_s=bytes_per_s, **options) for one in locals_]
    async with trio.open_nursery() as nursery:
        prefetcher = Prefetcher(nursery)
        pairs = [_pair(local, prefetcher, nursery) for local in locals_]
        await wait_all_tasks_blocked()
        yield Couple(*pairs, prefetcher, copied)
        await wait_all_tasks_blocked()
        assert not prefetcher._flights
        nursery.cancel_scope.cancel()
    for local in locals_:
        local.pool.check()
        assert local.pool.num_leased == 0


def _pair(local: LocalEngine, prefetcher: Prefetcher, nursery: trio.Nursery) -> Pair:
    remote = RemoteEngine(local.facts, name=local.name, prefetcher=prefetcher)
    return Pair(remote, local, live(remote, local, nursery))


async def transfer(two: Couple, lease: LeaseRef) -> Any:
    """As the operator does it, after which decode may begin."""
    target = await two.reserve()
    source = two.prefill.remote.export(lease)
    try:
        await target.receive(source)
    finally:
        source.release()
    return target


async def test_only_the_last_step_is_left_to_the_transfer(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with couple(monkeypatch) as two:
        await two.reserve()
        await two.begin()
        lease = await two.computed()
        assert two.num_copied == NUM_EARLY
        began_s = trio.current_time()
        target = await transfer(two, lease)
        assert trio.current_time() - began_s == pytest.approx(BLOCK_S)
        assert two.num_copied == NUM_BLOCKS
        assert two.decode.local.load.num_early_blocks == NUM_EARLY
        await two.decode.remote.submit(two.adopted_by(target.lease))
        await trio.sleep(60)


FIRST, LAST = range(NUM_LAYERS // 2), range(NUM_LAYERS // 2, NUM_LAYERS)
ALL = range(NUM_LAYERS)


async def test_a_prompt_of_one_step_moves_layer_by_layer_while_it_is_computed(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with couple(monkeypatch, least_part_bytes=1, step=1000) as two:
        await two.reserve()
        await two.begin()
        lease = await two.computed()
        assert two.copied == [(NUM_BLOCKS, FIRST)]
        began_s = trio.current_time()
        target = await transfer(two, lease)
        assert trio.current_time() - began_s == pytest.approx(BLOCK_S * NUM_BLOCKS / 2)
        assert two.copied == [(NUM_BLOCKS, FIRST), (NUM_BLOCKS, LAST)]
        assert two.decode.local.load.num_early_blocks == NUM_BLOCKS / 2
        await two.decode.remote.submit(two.adopted_by(target.lease))
        await trio.sleep(60)


async def test_layers_of_one_step_go_before_the_rest_of_them_and_the_next_step(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with couple(monkeypatch, least_part_bytes=1, step=96) as two:
        await two.reserve()
        await two.begin()
        target = await transfer(two, await two.computed())
        steps = (6, 6, 1)  # blocks of each
        assert two.copied == [(blocks, half) for blocks in steps for half in (FIRST, LAST)]
        target.abort()


async def test_small_parts_wait_for_more_layers_each_for_its_own(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of two prompts do not add up to a large one."""
    async with couple(monkeypatch, step=1000) as two:
        block_bytes = two.prefill.local.facts.kv_block_bytes
        monkeypatch.setattr(layer_watch, "LEAST_PART_BYTES", NUM_BLOCKS * block_bytes // 2 + 1)
        await two.reserve()
        short = sequence(request_id="s", prompt_token_ids=PROMPT[100:], hold_kv=True)
        await two.prefill.remote.submit(short)
        await two.begin()
        target = await transfer(two, await two.computed("r"))
        assert two.copied == [(NUM_BLOCKS, ALL)]
        target.abort()
        two.prefill.remote.cancel("s", 0, 0)


async def test_where_nothing_is_reserved_nothing_moves(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with couple(monkeypatch) as two:
        await two.begin()
        lease = await two.computed()
        assert two.copied == []
        target = await transfer(two, lease)
        assert two.copied == [(NUM_BLOCKS, ALL)]
        target.abort()


async def test_layers_that_fail_come_with_the_next_step(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_part: Callable[..., Any] = PoolTarget.fetch_part

    async def fails(self: PoolTarget, source: Any, part: Part) -> None:
        if (part.first, part.first_layer) == (2, len(FIRST)):
            raise DamagedBlocks("x")
        await fetch_part(self, source, part)

    monkeypatch.setattr(PoolTarget, "fetch_part", fails)
    async with couple(monkeypatch, least_part_bytes=1) as two:
        await two.reserve()
        await two.begin()
        target = await transfer(two, await two.computed())
        halves = [(2, FIRST), (2, LAST), (2, FIRST)]
        assert two.copied[:4] == [*halves, (4, ALL)]
        assert two.num_copied == NUM_BLOCKS + 1  # those of two blocks came twice
        target.abort()


@pytest.mark.parametrize("error", [DamagedBlocks("x"), StaleLease("x")], ids=["damaged", "stale"])
async def test_a_part_that_fails_is_left_to_the_transfer(
    error: Exception, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_part: Callable[..., Any] = PoolTarget.fetch_part

    async def fails(self: PoolTarget, source: Any, part: Part) -> None:
        if part.first == 4:
            raise error
        await fetch_part(self, source, part)

    monkeypatch.setattr(PoolTarget, "fetch_part", fails)
    async with couple(monkeypatch) as two:
        await two.reserve()
        await two.begin()
        target = await transfer(two, await two.computed())
        assert two.copied == [(2, ALL), (2, ALL), (NUM_BLOCKS - 4, ALL)]
        target.abort()


PARTS = pytest.mark.parametrize("least_part_bytes", [1, 2**40], ids=["layers", "steps"])


@PARTS
async def test_a_cancelled_prompt_leaves_nothing(
    least_part_bytes: int, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with couple(monkeypatch, least_part_bytes=least_part_bytes) as two:
        target = await two.reserve()
        await two.begin()
        await trio.sleep(0.1)
        assert two.copied
        target.abort()
        two.prefill.remote.cancel("r", 0, 0)
        await trio.sleep(1)


@PARTS
@pytest.mark.parametrize("victim", ["prefill", "decode"])
async def test_a_worker_that_dies_meanwhile_takes_nobody_with_it(
    victim: str,
    least_part_bytes: int,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with couple(monkeypatch, least_part_bytes=least_part_bytes) as two:
        target = await two.reserve()
        await two.begin()
        await trio.sleep(0.1)
        getattr(two, victim).lose()
        await trio.sleep(1)
        if victim == "decode":
            lease = await two.computed()
            with pytest.raises(EngineLost):
                await target.receive(two.prefill.remote.export(lease))
            two.prefill.remote.cancel("r", 0, 0)
        target.abort()
