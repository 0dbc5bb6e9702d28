"""The speed of block transfers from another process, by each transport and by plain ZeroMQ."""

import base64
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import msgspec
import trio
import zmq

from benchmarks.kv_peer import BLOCKS, NUM_BYTES, opened
from sagellm.runtime.kv.transport import BlockLocation, Transport

KINDS = ("memory", "tcp", "nixl")
NUM_EACH = 5  # consecutive transfers of one kind, before the next kind has its turn


async def transports(rounds: int) -> dict[str, Any]:
    """Times to fetch and check the blocks of 2,048 tokens of the 0.5B shape, after their offer.

    `zeromq` is the bound: the same bytes over loopback tcp in messages of 4 MiB, neither copied nor
    checked.
    """
    seconds: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "zeromq")}
    for _ in range(rounds):
        for kind in KINDS:
            seconds[kind] += await _fetches(kind)
        seconds["zeromq"] += _pulls()
    found: dict[str, Any] = {"num_bytes": NUM_BYTES}
    for kind, times in seconds.items():
        taken_s = median(times)
        found[kind] = {
            "ms": round(1e3 * taken_s, 2),
            "gb_per_s": round(NUM_BYTES / taken_s / 1e9, 2),
        }
    found["tcp_share_of_zeromq"] = round(median(seconds["zeromq"]) / median(seconds["tcp"]), 3)
    return found


async def _fetches(kind: str) -> list[float]:
    receiver = opened(kind)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receiver.run)
        with _peer(kind) as peer:
            await _fetch_s(peer, receiver)
            times = [await _fetch_s(peer, receiver) for _ in range(NUM_EACH)]
        nursery.cancel_scope.cancel()
    return times


async def _fetch_s(peer: "subprocess.Popen[str]", receiver: Transport) -> float:
    source = msgspec.msgpack.decode(base64.b64decode(_said(peer)), type=BlockLocation)
    began_s = time.perf_counter()
    await receiver.fetch(source, BLOCKS, lambda: None)
    return time.perf_counter() - began_s


def _pulls() -> list[float]:
    times = []
    with _peer("zeromq") as peer, zmq.Context() as context, context.socket(zmq.PULL) as socket:
        assert peer.stdout is not None
        assert peer.stdin is not None
        socket.connect(f"tcp://127.0.0.1:{int(peer.stdout.readline())}")
        for _ in range(1 + NUM_EACH):
            began_s = time.perf_counter()
            peer.stdin.write("\n")
            peer.stdin.flush()
            num_bytes = 0
            while num_bytes < NUM_BYTES:
                num_bytes += len(socket.recv(copy=False).buffer)
            times.append(time.perf_counter() - began_s)
    return times[1:]


def _said(peer: "subprocess.Popen[str]") -> str:
    assert peer.stdin is not None
    assert peer.stdout is not None
    peer.stdin.write("\n")
    peer.stdin.flush()
    return peer.stdout.readline()


@contextmanager
def _peer(kind: str) -> "Iterator[subprocess.Popen[str]]":
    command = [sys.executable, "-m", "benchmarks.kv_peer", kind]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        process.kill()
