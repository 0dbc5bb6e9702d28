"""Prefetched chunks of a prompt, and the faults that end a prefetch."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from remote_engines import Pair, live, open_null, sequence
from trio.testing import MockClock, wait_all_tasks_blocked

from sagellm.runtime.engine.kinds.modelled import ModelledStorage
from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.runtime.engine.remote_kv import Prefetcher, RemoteKVEngine
from sagellm.runtime.kv.transfer import PoolTarget
from sagellm.runtime.kv.transport import KVChunk
from sagellm.runtime.messages import LeaseRef
from sagellm.runtime.port import (
    DamagedBlocks,
    EngineLost,
    LeaseOffer,
    PrefillDone,
    StaleLease,
)

NUM_TOKENS, STEP = 200, 32  # a prompt of 13 blocks in 7 steps, two blocks each
NUM_BLOCKS, NUM_EARLY = 13, 12
BLOCK_S = 1e-3  # to copy one; a step takes 32 ms
PROMPT = tuple(n % 250 for n in range(NUM_TOKENS))


@dataclass
class Couple:
    """Two engines: one computes prompts, one decodes. `copied`: blocks of each copy."""

    prefill: Pair
    decode: Pair
    prefetcher: Prefetcher
    copied: list[int]

    @property
    def num_copied(self) -> int:
        return sum(self.copied)

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
async def couple(monkeypatch: pytest.MonkeyPatch, *, step: int = STEP) -> AsyncIterator[Couple]:
    copied: list[int] = []
    fetch = ModelledStorage.fetch

    async def noted(self: ModelledStorage, source: Any, blocks: Any, check: Any) -> None:
        await fetch(self, source, blocks, check)
        copied.append(len(blocks))

    monkeypatch.setattr(ModelledStorage, "fetch", noted)
    options: dict[str, Any] = {"max_num_batched_tokens": step, "prefill_token_s": 1e-3}
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
        assert not prefetcher._prefetches
        nursery.cancel_scope.cancel()
    for local in locals_:
        local.pool.check()
        assert local.pool.num_leased == 0


def _pair(local: LocalEngine, prefetcher: Prefetcher, nursery: trio.Nursery) -> Pair:
    remote = RemoteKVEngine(local.facts, name=local.name, prefetcher=prefetcher)
    return Pair(remote, local, live(remote, local, nursery))


async def transfer(two: Couple, lease: LeaseRef) -> Any:
    """Transfer as the operator does. Afterwards decode may begin."""
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


async def test_where_nothing_is_reserved_nothing_moves(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with couple(monkeypatch) as two:
        await two.begin()
        lease = await two.computed()
        assert two.copied == []
        target = await transfer(two, lease)
        assert two.copied == [NUM_BLOCKS]
        target.abort()


@pytest.mark.parametrize("error", [DamagedBlocks("x"), StaleLease("x")], ids=["damaged", "stale"])
async def test_a_chunk_that_fails_is_left_to_the_transfer(
    error: Exception, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_chunk: Callable[..., Any] = PoolTarget.fetch_chunk

    async def fails(self: PoolTarget, source: Any, chunk: KVChunk) -> None:
        if chunk.first == 4:
            raise error
        await fetch_chunk(self, source, chunk)

    monkeypatch.setattr(PoolTarget, "fetch_chunk", fails)
    async with couple(monkeypatch) as two:
        await two.reserve()
        await two.begin()
        target = await transfer(two, await two.computed())
        assert two.copied == [2, 2, NUM_BLOCKS - 4]
        target.abort()


async def test_a_cancelled_prompt_leaves_nothing(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with couple(monkeypatch) as two:
        target = await two.reserve()
        await two.begin()
        await trio.sleep(0.1)
        assert two.copied
        target.abort()
        two.prefill.remote.cancel("r", 0, 0)
        await trio.sleep(1)


@pytest.mark.parametrize("victim", ["prefill", "decode"])
async def test_a_worker_that_dies_meanwhile_fails_no_other(
    victim: str,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with couple(monkeypatch) as two:
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
