"""Eight of 64 clients read nothing: the loss of the other 56, and the memory, are bounded."""

from statistics import median

import psutil
import pytest
import trio
from gateway_readers import COSTS, SEND_BYTES, STALL_S, STREAMING, Readers
from gateway_served import SERVERS
from gateway_session import served_session

NUM_READERS, NUM_SLOW, NUM_TOKENS = 56, 8, 300
NUM_ROUNDS = 3
LOSS, GROWN_BYTES = 0.02, 16 << 20

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("server", SERVERS)
async def test_others_lose_nothing(server: str) -> None:
    process = psutil.Process()
    async with (
        served_session(server, "joint", COSTS, SEND_BYTES, streaming=STREAMING) as served,
        Readers(served) as readers,
    ):
        await readers.run(NUM_READERS + NUM_SLOW, 0, 20)
        before_bytes = process.memory_info().rss
        without, beside = [], []
        for _ in range(NUM_ROUNDS):
            without.append(await round_s(readers, NUM_READERS + NUM_SLOW, 0))
            beside.append(await round_s(readers, NUM_READERS, NUM_SLOW))
        grown_bytes = process.memory_info().rss - before_bytes
        assert served.is_at_rest
        await readers.check_slow()
    loss = 1 - median(without) / median(beside)
    print(f"{server}: 300 tokens in {without} s, beside slow ones {beside} s: {loss:.1%} lost;")
    print(f"memory grew by {grown_bytes / 2**20:.1f} MiB")
    assert loss < LOSS
    assert grown_bytes < GROWN_BYTES


async def round_s(readers: Readers, num_readers: int, num_slow: int) -> float:
    """The median time of an answer; slow readers are ended before this returns."""
    readers.seconds.clear()
    await readers.run(num_readers, num_slow, NUM_TOKENS)
    with trio.fail_after(STALL_S + 10):
        await readers.ended()
    return median(readers.seconds)
