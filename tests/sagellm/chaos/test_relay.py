"""The relay causes exactly the faults that are set."""

import random
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from sagellm.chaos.relay import LinkFaults, Relay

DATA = secrets.token_bytes(20_000)


@asynccontextmanager
async def relayed(**faults: object) -> AsyncIterator[tuple[Relay, trio.SocketStream]]:
    """A relay before a server that echoes, and a connection to it."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, echo, listeners)
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        address: tuple[str, int] = listeners[0].socket.getsockname()
        relay = Relay(listening, socket.AF_INET, address, random.Random(1), LinkFaults(**faults))  # type: ignore[arg-type]
        nursery.start_soon(relay.run)
        async with await trio.open_tcp_stream(*listening.getsockname()) as stream:
            yield relay, stream
        nursery.cancel_scope.cancel()


async def echo(stream: trio.SocketStream) -> None:
    try:
        async for data in stream:
            await stream.send_all(data)
    except trio.BrokenResourceError:
        pass


async def said(stream: trio.SocketStream, size: int = len(DATA)) -> bytes:
    """The bytes of DATA that the server echoes."""
    heard = bytearray()
    with trio.fail_after(10):
        await stream.send_all(DATA)
        while len(heard) < size and (data := await stream.receive_some()):
            heard += data
    return bytes(heard)


@pytest.mark.parametrize("faults", [{}, {"chunk_bytes": 7}, {"delay_s": 0.01}])
async def test_what_is_not_changed_comes_as_it_was(faults: dict[str, object]) -> None:
    async with relayed(**faults) as (_, stream):
        assert await said(stream) == DATA


async def test_a_delay_is_each_way_and_does_not_add_up() -> None:
    async with relayed(delay_s=0.1, chunk_bytes=100) as (_, stream):
        began_s = trio.current_time()
        assert await said(stream) == DATA
        assert 0.2 <= trio.current_time() - began_s < 2


async def test_bytes_come_no_faster_than_they_may() -> None:
    async with relayed(bytes_per_s=100_000) as (_, stream):
        began_s = trio.current_time()
        assert await said(stream) == DATA
        assert trio.current_time() - began_s >= len(DATA) / 100_000


async def test_nothing_passes_a_cut_and_nothing_is_lost_in_it() -> None:
    async with relayed() as (relay, stream):
        relay.faults.is_cut = True
        with trio.move_on_after(0.2) as waited:
            await said(stream)
        assert waited.cancelled_caught
        relay.faults.is_cut = False
        heard = bytearray()
        while len(heard) < len(DATA):
            heard += await stream.receive_some()
        assert heard == DATA


async def test_one_bit_is_flipped() -> None:
    async with relayed(num_to_flip=1) as (relay, stream):
        heard = await said(stream)
    different = [one ^ other for one, other in zip(heard, DATA, strict=True) if one != other]
    assert len(different) == 1
    assert different[0].bit_count() == 1
    assert relay.num_flipped == 1


async def test_a_connection_is_reset() -> None:
    async with relayed(reset_every=3, chunk_bytes=1000) as (relay, stream):
        with pytest.raises(trio.BrokenResourceError):
            await said(stream, size=10 * len(DATA))
        assert relay.num_resets >= 1


async def test_where_nobody_listens_the_relay_goes_on() -> None:
    async with relayed() as (relay, _):
        relay.address = ("127.0.0.1", 1)
        async with await trio.open_tcp_stream(*relay.listening.getsockname()) as stream:
            assert await stream.receive_some() == b""
        async with await trio.open_tcp_stream(*relay.listening.getsockname()) as stream:
            assert await stream.receive_some() == b""
