from collections.abc import Sequence

import pytest
import trio
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from benchmarks.gateway.load import Tally, Unanswered, ask

# A head that ends with the bytes that end a chunked body, as cpp-httplib's does.
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nKeep-Alive: timeout=5, max=100\r\n\r\n"
EVENT = b"9\r\ndata: x\n\n\r\n"
END = b"0\r\n\r\n"


async def asked(*parts: bytes) -> Tally:
    """What a client tallies whose server answers so, each part on its own, and hangs up."""
    client, server = memory_stream_pair()
    tally = Tally()

    async def answer(parts: Sequence[bytes]) -> None:
        await server.receive_some()
        for part in parts:
            await server.send_all(part)
            await wait_all_tasks_blocked()
        await server.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer, parts)
        await ask(client, b"POST / HTTP/1.1\r\n\r\n", tally)
    return tally


async def test_a_head_is_not_taken_for_the_end_of_the_body() -> None:
    tally = await asked(HEAD, EVENT, EVENT, END)
    assert (tally.num_events, tally.num_failed, len(tally.latencies_s)) == (2, 0, 1)


async def test_the_end_may_come_in_pieces() -> None:
    assert (await asked(HEAD + EVENT, END[:2], END[2:])).num_events == 1


async def test_an_answer_with_a_length_ends_there() -> None:
    tally = await asked(b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\n", b"bu", b"sy")
    assert (tally.num_failed, len(tally.latencies_s)) == (1, 1)


async def test_a_connection_that_ends_unanswered_is_told_from_half_an_answer() -> None:
    with pytest.RaisesGroup(Unanswered):
        await asked()
    with pytest.RaisesGroup(pytest.RaisesExc(ConnectionError, check=_is_half)):
        await asked(HEAD, EVENT)


def _is_half(error: BaseException) -> bool:
    return not isinstance(error, Unanswered)
