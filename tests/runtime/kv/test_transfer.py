"""Copies between pools: the right blocks arrive, and a lost lease stops the copy."""

import numpy as np
import pytest
import trio
import trio.testing

from sagellm.backends.cpu.kv_storage import CpuStorage
from sagellm.runtime.engine.kinds.modelled import ModelledStorage
from sagellm.runtime.kv.lease import Fence
from sagellm.runtime.kv.memory import DeviceStorage, PoolBytes
from sagellm.runtime.kv.pool import BlockPool
from sagellm.runtime.kv.transfer import PoolTransfers
from sagellm.runtime.port import StaleLease

FENCE = Fence("r", 0, 0)
SHAPE = (2, 2, 8, 1, 4, 3)  # layers, keys and values, blocks, heads, block size, head size


class Side:
    """A pool of eight blocks of four tokens, with its transfers."""

    def __init__(self, name, storage):
        self.pool = BlockPool(8, 4)
        self.storage = storage
        self.exchange = PoolTransfers(self.pool, storage, engine=name, replica=0)

    def send(self, num_tokens=10):
        lease = self.pool.reserve(FENCE, num_tokens)
        return self.exchange.export(self.exchange.hold(lease, num_tokens))

    def reserve(self, num_tokens=10):
        return self.exchange.open_target(self.pool.reserve(FENCE, num_tokens, "transfer"))


def tensors(fill):
    made = np.zeros(SHAPE, np.float32)
    if fill:
        made[:] = np.random.default_rng(0).random(SHAPE)
    return DeviceStorage(PoolBytes(CpuStorage(made)))


async def test_blocks_arrive_bit_for_bit():
    left, right = Side("p", tensors(True)), Side("d", tensors(False))
    left.pool.reserve(Fence("other", 0, 0), 8)  # so that block numbers differ
    source, target = left.send(), right.reserve()
    sent, landed = source.held.blocks, target.held.blocks
    await target.receive(source)
    assert sent != landed
    theirs, ours = (side.storage.pool.storage.pool for side in (left, right))
    assert np.array_equal(ours[:, :, landed], theirs[:, :, sent])
    assert target.held.state == "filled"
    source.release()
    assert source.held.state == "released"


async def test_a_source_that_is_cancelled_midway_aborts_the_target(monkeypatch):
    monkeypatch.setattr("sagellm.runtime.kv.memory._CHUNK_BYTES", 1)
    left, right = Side("p", tensors(True)), Side("d", tensors(False))
    source, target = left.send(), right.reserve()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def receive():
            with pytest.raises(StaleLease):
                await target.receive(source)

        await trio.lowlevel.checkpoint()
        left.pool.advance(source.held, "cancel")
    assert left.pool.num_leased == right.pool.num_leased == 0


async def test_a_cancelled_copy_gives_its_blocks_back(autojump_clock):
    left, right = Side("p", ModelledStorage(1000, 100)), Side("d", ModelledStorage(1000, 100))
    source, target = left.send(), right.reserve()
    with trio.move_on_after(5):
        await target.receive(source)
    assert right.pool.num_leased == 0
    assert right.exchange.target(FENCE) is None
    assert source.held.state == "sending"
    source.release()
    assert left.pool.num_leased == 0


async def test_a_null_copy_takes_its_time(autojump_clock):
    left, right = Side("p", ModelledStorage(1000, 100)), Side("d", ModelledStorage(1000, 100))
    source, target = left.send(), right.reserve()
    start = trio.current_time()
    await target.receive(source)
    assert trio.current_time() - start == pytest.approx(3 * 1000 / 100)


async def test_an_adopted_lease_survives_an_abort():
    left, right = Side("p", tensors(True)), Side("d", tensors(False))
    target = right.reserve()
    await target.receive(left.send())
    lease = right.exchange.adopt(target.lease, FENCE)
    target.abort()
    assert lease.state == "filled"
    assert lease.owner == "sequence"


async def test_a_lease_is_adopted_once():
    left, right = Side("p", tensors(True)), Side("d", tensors(False))
    target = right.reserve()
    await target.receive(left.send())
    right.exchange.adopt(target.lease, FENCE)
    with pytest.raises(StaleLease, match="has an owner already"):
        right.exchange.adopt(target.lease, FENCE)


def test_an_empty_landing_cannot_be_adopted():
    side = Side("d", tensors(False))
    target = side.reserve()
    with pytest.raises(StaleLease, match="is reserved, not filled"):
        side.exchange.adopt(target.lease, FENCE)


def test_a_lease_is_exported_once():
    side = Side("p", tensors(True))
    ref = side.exchange.hold(side.pool.reserve(FENCE, 10), 10)
    side.exchange.export(ref)
    with pytest.raises(StaleLease, match="not held"):
        side.exchange.export(ref)


def test_cancel_frees_what_is_held_and_what_is_reserved():
    side = Side("p", tensors(True))
    side.exchange.hold(side.pool.reserve(FENCE, 10), 10)
    side.reserve()
    side.exchange.cancel(FENCE)
    assert side.pool.num_leased == 0
    side.exchange.cancel(FENCE)
    side.pool.check()


async def test_only_pools_of_this_process_are_received_from():
    side = Side("d", tensors(False))
    with pytest.raises(TypeError, match="of its process"):
        await side.reserve().receive(object())
