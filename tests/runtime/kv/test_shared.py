"""Blocks of one process read from another: the same bytes, or an error; never others."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from sagellm.runtime.engine.port import DamagedBlocks, StaleLease
from sagellm.runtime.kv import tensor_storage
from sagellm.runtime.kv.shared import SharedMemory, map_shared
from sagellm.runtime.kv.tensor_storage import TensorStorage

SHAPE = (3, 2, 64, 2, 4, 8)  # layers, keys and values, blocks, heads, block size, head size
SENT = [3, 4, 5, 9, 8, 20, 21, 60]
LANDED = [1, 2, 3, 4, 5, 40, 41, 42]


def shared_pool() -> TensorStorage:
    memory = SharedMemory(4 * int(np.prod(SHAPE)))
    pool = torch.frombuffer(memory.view, dtype=torch.float32).view(SHAPE)
    pool.copy_(torch.rand(SHAPE))
    return TensorStorage(pool, memory)


def empty_pool() -> TensorStorage:
    return TensorStorage(torch.zeros(SHAPE))


@pytest.fixture(params=[1, 8000, 10**9], ids=["a layer", "some layers", "all"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_storage, "_CHUNK_BYTES", request.param)


async def test_blocks_arrive_bit_for_bit_and_no_others(chunk: None) -> None:
    sender, receiver = shared_pool(), empty_pool()
    await receiver.fetch(await sender.share(SENT, lambda: None), LANDED, lambda: None)
    assert torch.equal(receiver.pool[:, :, LANDED], sender.pool[:, :, SENT])
    others = [block for block in range(SHAPE[2]) if block not in LANDED]
    assert not receiver.pool[:, :, others].any()


async def test_damaged_blocks_are_copied_again_and_never_kept(
    chunk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = shared_pool(), empty_pool()
    copy, num_copies = TensorStorage._copy, 0

    def damaging(self: TensorStorage, *given: Any) -> int:
        nonlocal num_copies
        num_copies += 1
        return copy(self, *given) ^ num_copies % 2

    monkeypatch.setattr(TensorStorage, "_copy", damaging)
    source = await sender.share(SENT, lambda: None)
    await receiver.fetch(source, LANDED, lambda: None)
    assert num_copies == 2 * len(source.sums)
    assert torch.equal(receiver.pool[:, :, LANDED], sender.pool[:, :, SENT])


async def test_blocks_that_stay_damaged_are_an_error(chunk: None) -> None:
    sender, receiver = shared_pool(), empty_pool()
    source = await sender.share(SENT, lambda: None)
    sender.pool[2, 1, SENT[-1], 0, 0, 0] += 1  # somebody wrote a block that was sent
    with pytest.raises(DamagedBlocks):
        await receiver.fetch(source, LANDED, lambda: None)


async def test_a_lease_that_ends_stops_the_copy(chunk: None) -> None:
    def check() -> None:
        raise StaleLease("gone")

    sender, receiver = shared_pool(), empty_pool()
    with pytest.raises(StaleLease):
        await receiver.fetch(await sender.share(SENT, lambda: None), LANDED, check)
    assert not receiver.pool.any()


def test_memory_of_a_process_that_is_gone_is_stale() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    with pytest.raises(StaleLease, match="is gone"):
        map_shared(gone.pid, 3, 100)


def test_other_memory_than_was_said_is_stale() -> None:
    memory = SharedMemory(4096)
    assert len(map_shared(os.getpid(), memory.descriptor, 4096)) == 4096
    with pytest.raises(StaleLease, match="other memory"):
        map_shared(os.getpid(), memory.descriptor, 8192)


def test_what_is_mapped_cannot_be_written() -> None:
    memory = SharedMemory(4096)
    assert map_shared(os.getpid(), memory.descriptor, 4096).readonly
