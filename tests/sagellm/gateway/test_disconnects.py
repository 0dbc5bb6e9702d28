"""Clients that leave, by FIN and by RST, wherever their request is: nothing of it stays behind."""

import random
import socket
import struct
from collections import Counter
from dataclasses import dataclass, field

import psutil
import pytest
import trio
import trio.testing
from gateway_served import DEFAULT_SERVER, post
from gateway_session import Held, ServedSession, held, late_wakes, served_session

from sagellm.load.report import percentile

NUM_CLIENTS = 500
NUM_AT_ONCE = 16
KV_BYTES_PER_S = 2e6  # 10 ms a block
FREED_S = 0.1  # p99, from leaving to the return of the last block
SLOW = {
    f"{engine}.{option}": value
    for engine in ("p", "d")
    for option, value in {
        "device": "null",
        "max_num_batched_tokens": 64,
        "prefill_token_s": 2e-4,
        "decode_step_s": 0.005,
        "kv_bytes_per_s": KV_BYTES_PER_S,
        "num_blocks": 1024,
        "max_model_len": 1024,
    }.items()
}
SLOW |= {"prefill.max_inflight": 6, "generate.max_inflight": 4, "transfer.max_inflight": 6}


@dataclass
class Leavers:
    """Clients of one gateway, and what was seen of them."""

    served: ServedSession
    draw: random.Random
    freed: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    seconds: list[float] = field(default_factory=list)
    phases: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.served.on_free(self.freed.unpark_all)
        self.served.session.observers.append(self)

    def submitted(self, requests: object) -> None:
        """Nothing has become free."""

    def delivered(self, item: object) -> None:
        self.freed.unpark_all()

    async def run(self, num_clients: int) -> None:
        limiter = trio.CapacityLimiter(NUM_AT_ONCE)
        async with trio.open_nursery() as nursery:
            for number in range(num_clients):
                await limiter.acquire_on_behalf_of(number)
                nursery.start_soon(self._one, f"r{number}", number, limiter)

    async def _one(self, request_id: str, number: int, limiter: trio.CapacityLimiter) -> None:
        try:
            await self._ask_and_leave(request_id)
        finally:
            limiter.release_on_behalf_of(number)

    async def _ask_and_leave(self, request_id: str) -> None:
        draw, stream = self.draw, await self.served.connect()
        body = {
            # All different: what is computed already is in no phase for long.
            "prompt": draw.choices(range(1, 100), k=draw.choice((8, 40, 100, 200))),
            "max_tokens": 500,
            "ignore_eos": True,
            "stream": draw.random() < 0.8,
            "n": draw.choice((1, 1, 2)),
        }
        await stream.send_all(post("/v1/completions", body, f"X-Request-Id: {request_id}"))
        with trio.move_on_after(draw.uniform(0.0, 0.4)):
            while await stream.receive_some():
                pass
        phase, is_known = self.phase(request_id), self.is_held(request_id)
        await leave(stream, by_reset=draw.random() < 0.5)
        left_s = trio.current_time()
        with trio.fail_after(10):
            while self.is_held(request_id):
                await self.freed.park()
        if is_known:
            self.phases[phase] += 1
            self.seconds.append(trio.current_time() - left_s)

    def phase(self, request_id: str) -> str:
        """Where it is, by the blocks that are leased for it."""
        states = {
            (engine.name, lease.owner, lease.state)
            for engine in self.served.engines
            for lease in engine.pool.leases
            if lease.fence.request_id == request_id
        }
        if any(state in ("sending", "receiving") for _, _, state in states):
            return "transfer"
        if any(name == "p" for name, _, _ in states):
            return "prefill"
        return "decode" if states else "queue"

    def is_held(self, request_id: str) -> bool:
        is_open = request_id in self.served.session.executor.core.register
        return is_open or self.phase(request_id) != "queue"


async def leave(stream: trio.SocketStream, *, by_reset: bool) -> None:
    """Close a connection; by RST nothing that was sent before needs to arrive."""
    if by_reset:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await stream.aclose()


async def settled(served: ServedSession, most: Held | None = None) -> Held:
    """What is held once all connections are over, and no more than `most`; or after 5 seconds."""
    with trio.move_on_after(5):
        while True:
            await trio.testing.wait_all_tasks_blocked(0.05)
            now = held()
            is_quiet = served.is_at_rest and set(now.sockets) == {psutil.CONN_LISTEN}
            if is_quiet and now == (most or now):
                break
    return held()


@pytest.mark.alone
@pytest.mark.in_process
@pytest.mark.parametrize("server", DEFAULT_SERVER)
async def test_whoever_leaves_leaves_nothing_behind(server: str) -> None:
    async with served_session(server, "pd", SLOW) as served:
        assert await served.is_answering()
        leavers = Leavers(served, random.Random(7))
        await leavers.run(NUM_AT_ONCE)  # threads and caches are made at their first use
        before = await settled(served)
        async with late_wakes() as lates:
            await leavers.run(NUM_CLIENTS)
        assert await settled(served, before) == before
        assert served.is_at_rest
        assert await served.is_answering()
    freed_s, late_s = (percentile(sorted(found), 0.99) for found in (leavers.seconds, lates))
    print(f"{server}: {dict(leavers.phases)}; p99: freed {freed_s:.3f} s, late {late_s:.3f} s")
    assert min(leavers.phases[name] for name in ("queue", "prefill", "transfer", "decode")) >= 20
    assert freed_s <= FREED_S + late_s  # a busy machine wakes everybody late
