"""A process that offers blocks of a pool of its own: `python -m kv_sender KIND SEED BLOCK...`.

It writes where they are as one line of JSON, and withdraws them once its standard input ends.
"""

import base64
import sys
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import trio

from sagellm.backends.cpu.kv_storage import CpuStorage
from sagellm.runtime.kv.memory import PoolBytes, SharedMemory
from sagellm.runtime.kv.transport import Sharing, Transport
from sagellm.runtime.kv.transports import open_transport
from sagellm.runtime.port import StaleLease

SHAPE = (3, 2, 64, 2, 4, 8)  # layers, keys and values, blocks, heads, block size, head size
SIZE = 4 * 3 * 2 * 64 * 2 * 4 * 8


def opened(kind: str, seed: int | None, num_blocks: int = SHAPE[2]) -> tuple[CpuStorage, Transport]:
    """A pool of random values, or of zeros."""
    shape = (*SHAPE[:2], num_blocks, *SHAPE[3:])
    memory = SharedMemory(SIZE * num_blocks // SHAPE[2]) if kind == "memory" else None
    zeros = bytearray(SIZE * num_blocks // SHAPE[2])
    pool = np.frombuffer(memory.view if memory else zeros, dtype=np.float32).reshape(shape)
    if seed is not None:
        pool[:] = np.random.default_rng(seed).random(shape)
    storage = CpuStorage(pool)
    return storage, open_transport(Sharing(kind), PoolBytes(storage, memory))


async def offer(kind: str, seed: int, blocks: Sequence[int]) -> None:
    _, transport = opened(kind, seed)
    over: list[bool] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.run)
        located = await transport.offer(blocks, _check(over))
        print(base64.b64encode(msgspec.msgpack.encode(located)).decode(), flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        over.append(True)
        print("withdrawn", flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        nursery.cancel_scope.cancel()


def _check(over: list[bool]) -> Callable[[], None]:
    def check() -> None:
        if over:
            raise StaleLease("gone")

    return check


if __name__ == "__main__":
    kind: str = sys.argv[1]
    trio.run(offer, kind, int(sys.argv[2]), [int(block) for block in sys.argv[3:]])
