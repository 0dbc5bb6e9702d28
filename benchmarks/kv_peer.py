"""The sending process of `benchmarks.transports`: one offer on stdout for each line on stdin.

`python -m benchmarks.kv_peer KIND`: a kind of transport, or `zeromq`, which sends the plain bytes
to the connected socket.
"""

import base64
import math
import sys
from collections.abc import Sequence

import msgspec
import numpy as np
import trio
import zmq

from benchmarks.shape import QWEN05
from sagellm.backends.arrays import BFLOAT16
from sagellm.backends.cpu.kv_storage import CpuStorage
from sagellm.runtime.kv.memory import PoolBytes, SharedMemory
from sagellm.runtime.kv.transport import Sharing, Transport
from sagellm.runtime.kv.transports import open_transport

NUM_BLOCKS = 2048 // 16
SHAPE = (
    *(QWEN05.num_layers, 2, 4 * NUM_BLOCKS),
    *(QWEN05.num_kv_heads, 16, QWEN05.hidden // QWEN05.num_heads),
)
BLOCKS: Sequence[int] = range(NUM_BLOCKS, 2 * NUM_BLOCKS)
NUM_BYTES = 2 * math.prod(SHAPE) // 4
MESSAGE_BYTES = 4 * 2**20


def opened(kind: str) -> Transport:
    """A transport over a bfloat16 KV pool of the 0.5B shape, for four prompts of 2,048 tokens."""
    size = 2 * math.prod(SHAPE)
    memory = SharedMemory(size) if kind == "memory" else None
    buffer = memory.view if memory else bytearray(size)
    pool = np.frombuffer(buffer, dtype=BFLOAT16).reshape(SHAPE)
    pool.view(np.uint16).fill(0x3FC0)  # 1.5
    return open_transport(Sharing(kind), PoolBytes(CpuStorage(pool), memory))


async def offer(kind: str) -> None:
    transport = opened(kind)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.run)
        while await trio.to_thread.run_sync(sys.stdin.readline):
            located = await transport.offer(BLOCKS, lambda: None)
            print(base64.b64encode(msgspec.msgpack.encode(located)).decode(), flush=True)
        nursery.cancel_scope.cancel()


def push() -> None:
    payload = np.full(NUM_BYTES, 7, np.uint8).data
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        print(socket.bind_to_random_port("tcp://127.0.0.1"), flush=True)
        while sys.stdin.readline():
            for start in range(0, NUM_BYTES, MESSAGE_BYTES):
                socket.send(payload[start : start + MESSAGE_BYTES], copy=False)


if __name__ == "__main__":
    if sys.argv[1] == "zeromq":
        push()
    else:
        trio.run(offer, sys.argv[1])
