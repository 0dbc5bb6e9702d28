"""Blocks that are read from another pool: the same bytes or an error, never other bytes."""

import base64
import errno
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
import trio
from kv_sender import opened

from sagellm.backends.cpu import kv_storage
from sagellm.backends.cpu.kv_storage import CpuStorage
from sagellm.runtime.kv import memory as pool_bytes
from sagellm.runtime.kv.memory import PoolBytes, SharedMemory, SharedTransport, map_shared
from sagellm.runtime.kv.transport import (
    BlockLocation,
    SharedBlocks,
    TcpBlocks,
    Transport,
)
from sagellm.runtime.kv.transports import TRANSPORTS
from sagellm.runtime.port import DamagedBlocks, StaleLease

SENT = [3, 4, 5, 9, 8, 20, 21, 60]
LANDED = [1, 2, 3, 4, 5, 40, 41, 42]
KINDS = tuple(TRANSPORTS.ours)


def fine() -> None:
    """A lease that is held."""


def gone() -> None:
    raise StaleLease("gone")


class Pair:
    """A pool that sends, and an empty one that receives."""

    def __init__(self, kind: str) -> None:
        self.sent, self.sender = opened(kind, seed=1)
        self.landed, self.receiver = opened(kind, seed=None, num_blocks=48)

    async def move(
        self, check: Callable[[], None] = fine, sender_check: Callable[[], None] = fine
    ) -> None:
        source = await self.sender.offer(SENT, sender_check)
        await self.receiver.fetch(source, LANDED, check)

    @property
    def is_right(self) -> bool:
        others = [block for block in range(48) if block not in LANDED]
        arrived = np.array_equal(self.landed.pool[:, :, LANDED], self.sent.pool[:, :, SENT])
        return arrived and not self.landed.pool[:, :, others].any()


@asynccontextmanager
async def running(*transports: Transport) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for transport in transports:
            nursery.start_soon(transport.run)
        yield
        nursery.cancel_scope.cancel()


@pytest.fixture(params=KINDS)
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    both = Pair(request.param)
    async with running(both.sender, both.receiver):
        yield both


@pytest.fixture(params=[1, 8000, 10**9], ids=["a layer", "some layers", "all"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_bytes, "_CHUNK_BYTES", request.param)


async def test_blocks_arrive_bit_for_bit_and_no_others(chunk: None, pair: Pair) -> None:
    await pair.move()
    assert pair.is_right
    assert pair.receiver.num_damaged == 0


async def test_blocks_arrive_bit_for_bit_without_a_compiler(
    chunk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_storage, "native_kernels", lambda: None)
    pair = Pair("memory")
    await pair.move()
    assert pair.is_right
    pair.sent.pool[2, 1, SENT[-1], 0, 0, 0] += 1
    await pair.move()
    assert pair.is_right


async def test_a_lease_that_ends_stops_the_copy(chunk: None, pair: Pair) -> None:
    with pytest.raises(StaleLease):
        await pair.move(gone)
    assert not pair.landed.pool.any()


async def test_blocks_that_are_no_longer_leased_are_not_offered(pair: Pair) -> None:
    with pytest.raises(StaleLease):
        await pair.sender.offer(SENT, gone)


async def test_many_transfers_at_once(pair: Pair) -> None:
    source = await pair.sender.offer(SENT, fine)
    async with trio.open_nursery() as nursery:
        for start in range(0, 40, len(SENT)):
            nursery.start_soon(pair.receiver.fetch, source, range(start, start + len(SENT)), fine)
    for start in range(0, 40, len(SENT)):
        there = pair.landed.pool[:, :, start : start + len(SENT)]
        assert np.array_equal(there, pair.sent.pool[:, :, SENT])


async def test_a_transfer_that_is_cancelled_harms_no_other(pair: Pair) -> None:
    for after_s in (0.0, 1e-4, 1e-3):
        with trio.move_on_after(after_s):
            await pair.move()
    pair.landed.pool.fill(0)
    await pair.move()
    assert pair.is_right


@pytest.mark.parametrize("kind", ["memory", "nixl"])
async def test_blocks_written_after_they_were_offered_are_an_error(kind: str) -> None:
    pair = Pair(kind)  # over tcp what is there is sent, and sealed as it is sent
    source = await pair.sender.offer(SENT, fine)
    pair.sent.pool[2, 1, SENT[-1], 0, 0, 0] += 1
    with pytest.raises(DamagedBlocks):
        await pair.receiver.fetch(source, LANDED, fine)
    assert pair.receiver.num_damaged == 3


@pytest.mark.parametrize("block", [-1, 64, 10**9])
async def test_blocks_that_are_not_there_are_refused(block: int) -> None:
    pair = Pair("memory")
    source = await pair.sender.offer(SENT, fine)
    assert isinstance(source, SharedBlocks)
    assert pair.sent.num_blocks == 64
    wrong = msgspec.structs.replace(source, blocks=(*source.blocks[:-1], block))
    with pytest.raises(StaleLease, match="no such blocks"):
        await pair.receiver.fetch(wrong, LANDED, fine)
    assert not pair.landed.pool.any()


async def test_blocks_of_another_kind_are_refused(pair: Pair) -> None:
    other = SharedTransport(PoolBytes(pair.sent), SharedMemory(1))
    source: BlockLocation = await other.offer(SENT, fine)
    if isinstance(pair.receiver, SharedTransport):
        source = TcpBlocks(host="127.0.0.1", port=1, export=b"", key=b"", num_blocks=8)
    with pytest.raises(TypeError, match="not from"):
        await pair.receiver.fetch(source, LANDED, fine)


# ---- between processes ---------------------------------------------------------------------


@contextmanager
def sending(kind: str) -> Iterator[tuple[BlockLocation, "subprocess.Popen[str]"]]:
    """A process that offers SENT of the pool with seed 1."""
    command = [sys.executable, "-m", "kv_sender", kind, "1", *map(str, SENT)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield msgspec.msgpack.decode(base64.b64decode(line), type=BlockLocation), process
        process.kill()


@pytest.mark.parametrize("kind", KINDS)
async def test_blocks_come_from_another_process(kind: str) -> None:
    (sent, _), (landed, receiver) = opened("memory", seed=1), opened(kind, seed=None)
    async with running(receiver):
        with sending(kind) as (source, _), trio.fail_after(30):
            await receiver.fetch(source, LANDED, fine)
    assert np.array_equal(landed.pool[:, :, LANDED], sent.pool[:, :, SENT])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_process_that_is_gone_has_no_blocks(kind: str) -> None:
    landed, receiver = opened(kind, seed=None)
    async with running(receiver):
        with sending(kind) as (source, process):
            process.kill()
            process.wait()
            unreachable = StaleLease if kind == "memory" else DamagedBlocks
            with trio.fail_after(30), pytest.raises(unreachable):
                await receiver.fetch(source, LANDED, fine)
    assert not landed.pool.any()


async def test_blocks_that_were_withdrawn_are_not_sent_over_tcp() -> None:
    landed, receiver = opened("tcp", seed=None)
    async with running(receiver):
        with sending("tcp") as (source, process):
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "withdrawn\n"
            with pytest.raises(StaleLease):
                await receiver.fetch(source, LANDED, fine)
    assert not landed.pool.any()


# ---- over memory only ----------------------------------------------------------------------


async def test_damaged_blocks_are_copied_again_and_never_kept(
    chunk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair("memory")
    receive, num_copies = CpuStorage.receive, 0

    def damaging(self: CpuStorage, *given: Any) -> int:
        nonlocal num_copies
        num_copies += 1
        return receive(self, *given) ^ num_copies % 2

    monkeypatch.setattr(CpuStorage, "receive", damaging)
    await pair.move()
    assert num_copies == 2 * len(PoolBytes(pair.sent).chunks(len(SENT)))
    assert pair.receiver.num_damaged == num_copies // 2
    assert pair.is_right


def test_memory_of_a_process_that_is_gone_is_stale() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    with pytest.raises(StaleLease, match="is gone"):
        map_shared(ended.pid, 3, 100)


@pytest.mark.parametrize("call", ["os.open", "mmap.mmap"])
def test_a_process_that_may_open_no_more_files_says_so(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process lives, and the decode engine computes the blocks."""
    memory = SharedMemory(4096)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(f"sagellm.runtime.kv.memory.{call}", full)
    with pytest.raises(DamagedBlocks, match="Too many open files"):
        map_shared(os.getpid(), memory.descriptor, memory.size)


def test_other_memory_than_was_said_is_stale() -> None:
    memory = SharedMemory(4096)
    assert len(map_shared(os.getpid(), memory.descriptor, 4096)) == 4096
    with pytest.raises(StaleLease, match="other memory"):
        map_shared(os.getpid(), memory.descriptor, 8192)


def test_what_is_mapped_cannot_be_written() -> None:
    memory = SharedMemory(4096)
    assert map_shared(os.getpid(), memory.descriptor, 4096).readonly
