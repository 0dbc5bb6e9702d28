"""Clients that read nothing of their answers: bounded, ended, and no cost to the others."""

import psutil
import pytest
import trio
from gateway_readers import COSTS, SEND_BYTES, STALL_S, STREAMING, Readers
from gateway_served import DEFAULT_SERVER
from gateway_session import served_session

NUM_TOKENS = 100


@pytest.mark.parametrize("server", DEFAULT_SERVER)
async def test_clients_that_do_not_read_are_bounded_and_ended(server: str) -> None:
    process = psutil.Process()
    async with (
        served_session(server, "joint", COSTS, SEND_BYTES, streaming=STREAMING) as served,
        Readers(served) as readers,
    ):
        await readers.run(28, 0, 5)  # memory that is taken once
        before_bytes = process.memory_info().rss
        await readers.run(28, 4, NUM_TOKENS)
        with trio.fail_after(2 * STALL_S + 5):
            await readers.ended()
        grown_bytes = process.memory_info().rss - before_bytes
        assert served.is_at_rest
        await readers.check_slow()
        assert await served.is_answering()
    assert len(readers.seconds) == 2 * 28
    assert grown_bytes < 16 << 20
