"""One contract for every channel: order, once each, life signs, an end that is noticed."""

import pickle
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import zmq

from sagellm.runtime.comm.channel import ROOM, Channel, ChannelClosed, memory_channels
from sagellm.runtime.comm.frame import MAX_FRAME_BYTES, Frame, encode
from sagellm.runtime.comm.protocol import Cancel, Done, Ping, Pong
from sagellm.runtime.comm.zeromq import Dealer, Hub
from sagellm.runtime.engine.port import EngineHealth, EngineLoad

PONG = Pong(load=EngineLoad(), health=EngineHealth())


def cancel(number: int) -> Cancel:
    return Cancel(request_id="r", choice=number, epoch=0)


class Zeromq:
    """A hub with one announced peer, and that peer."""

    def __init__(self, folder: Path) -> None:
        self.hub = Hub()
        self.endpoint = self.hub.bind(f"ipc://{folder}/hub")
        self.name = secrets.token_bytes(16)
        self.link = self.hub.link(self.name, 3)
        self.dealer = Dealer(self.endpoint, self.name, 3)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Zeromq"]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.hub.run)
            nursery.start_soon(self.dealer.run)
            yield self
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def stranger(self, name: bytes) -> AsyncIterator["zmq.Socket[bytes]"]:
        socket = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, name)
        socket.connect(self.endpoint)
        try:
            yield socket
        finally:
            socket.close(linger=0)


@pytest.fixture
async def zeromq(tmp_path: Path) -> AsyncIterator[Zeromq]:
    async with Zeromq(tmp_path).running() as running:
        yield running


@pytest.fixture(params=["memory", "zeromq"])
async def sides(request: pytest.FixtureRequest, zeromq: Zeromq) -> tuple[Channel, Channel]:
    """The graph's, and the worker's."""
    return memory_channels() if request.param == "memory" else (zeromq.link, zeromq.dealer.link)


async def test_messages_come_in_order_and_once(sides: tuple[Channel, Channel]) -> None:
    graph, worker = sides
    for number in range(ROOM // 2):
        graph.put(cancel(number))
    for number in range(100):
        worker.put(Done(call=number))
    assert [await worker.receive() for _ in range(ROOM // 2)] == [*map(cancel, range(ROOM // 2))]
    assert [await graph.receive() for _ in range(100)] == [Done(call=n) for n in range(100)]


async def test_a_reader_waits_for_what_comes(sides: tuple[Channel, Channel]) -> None:
    graph, worker = sides
    found = []
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def read() -> None:
            found.append(await worker.receive())

        await trio.testing.wait_all_tasks_blocked(0.01)
        assert found == []
        graph.put(Ping())
    assert found == [Ping()]


async def test_both_sides_talk_at_once(sides: tuple[Channel, Channel]) -> None:
    graph, worker = sides

    async def ask() -> None:
        for _ in range(300):
            graph.put(Ping())
            assert await graph.receive() == PONG

    async def answer() -> None:
        for _ in range(300):
            assert await worker.receive() == Ping()
            worker.put(PONG)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(answer)


async def test_what_came_is_a_sign_of_life(sides: tuple[Channel, Channel]) -> None:
    graph, worker = sides
    before = trio.current_time()
    assert graph.heard_s < before
    worker.put(PONG)
    await graph.receive()
    assert before <= graph.heard_s <= trio.current_time()


async def test_a_closed_side_says_and_hears_nothing(sides: tuple[Channel, Channel]) -> None:
    graph, worker = sides
    worker.put(PONG)
    await trio.sleep(0.05)
    graph.close("it was enough")
    assert await graph.receive() == PONG  # what came before the end
    with pytest.raises(ChannelClosed, match="enough"):
        await graph.receive()
    with pytest.raises(ChannelClosed, match="enough"):
        graph.put(Ping())
    worker.put(PONG)  # nobody has told it
    graph.close()


async def test_closing_wakes_whoever_waits(sides: tuple[Channel, Channel]) -> None:
    graph, _ = sides
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def read() -> None:
            with pytest.raises(ChannelClosed):
                await graph.receive()

        await trio.testing.wait_all_tasks_blocked(0.01)
        graph.close()


async def test_a_peer_that_takes_nothing_ends_the_link(sides: tuple[Channel, Channel]) -> None:
    graph, _ = sides

    def flood() -> None:
        for number in range(100 * ROOM):
            graph.put(cancel(number))

    with pytest.raises(ChannelClosed, match="takes no messages"):
        flood()


# ---- over ZeroMQ only ----------------------------------------------------------------------


def garbage() -> dict[str, Any]:
    said = msgspec.msgpack.encode(PONG)
    return {
        "nothing": b"",
        "random": secrets.token_bytes(1000),
        "pickle": pickle.dumps({"a": 1}),
        "extension": msgspec.msgpack.encode(msgspec.msgpack.Ext(5, b"x" * 40)),
        "half a frame": encode(Frame(3, 0, said))[:-3],
        "another life": encode(Frame(2, 0, said)),
        "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    }


@pytest.mark.parametrize("kind", garbage())
async def test_garbage_of_a_known_peer_is_dropped(zeromq: Zeromq, kind: str) -> None:
    zeromq.dealer._port.socket.send(garbage()[kind])
    zeromq.dealer.link.put(PONG)
    assert await zeromq.link.receive() == PONG
    assert zeromq.hub.num_strange == 1


@pytest.mark.parametrize("kind", garbage())
async def test_garbage_of_the_hub_is_dropped(zeromq: Zeromq, kind: str) -> None:
    zeromq.dealer.link.put(PONG)  # so that the hub knows it
    await zeromq.link.receive()
    zeromq.hub._port.send([zeromq.name, garbage()[kind]])
    zeromq.link.put(Ping())
    assert await zeromq.dealer.link.receive() == Ping()


async def test_a_stranger_is_not_heard(zeromq: Zeromq) -> None:
    async with zeromq.stranger(b"somebody") as socket:
        socket.send(encode(Frame(3, 0, msgspec.msgpack.encode(PONG))))
        with trio.fail_after(5):
            while not zeromq.hub.num_strange:  # noqa: ASYNC110 - of another thread
                await trio.sleep(0.01)
    zeromq.dealer.link.put(PONG)
    assert await zeromq.link.receive() == PONG


async def test_a_frame_that_is_too_long_drops_its_sender_only(zeromq: Zeromq) -> None:
    async with zeromq.stranger(b"somebody") as socket:
        socket.send(bytes(MAX_FRAME_BYTES + 1))
        await trio.sleep(0.1)
    zeromq.dealer.link.put(PONG)
    assert await zeromq.link.receive() == PONG


@pytest.mark.parametrize("number", [1, 2**63])
async def test_a_gap_ends_the_link(zeromq: Zeromq, number: int) -> None:
    said = msgspec.msgpack.encode(PONG)
    zeromq.dealer._port.socket.send(encode(Frame(3, number, said)))
    with pytest.raises(ChannelClosed, match="was due"):
        await zeromq.link.receive()


@pytest.mark.parametrize(
    "body", [b"", b"\x81", msgspec.msgpack.encode({"type": "pong"}), msgspec.msgpack.encode(Ping())]
)
async def test_a_message_that_is_none_ends_the_link(zeromq: Zeromq, body: bytes) -> None:
    zeromq.dealer._port.socket.send(encode(Frame(3, 0, body)))
    with pytest.raises(ChannelClosed, match="nobody understands"):
        await zeromq.link.receive()


async def test_what_is_said_before_the_peer_is_there_reaches_it(tmp_path: Path) -> None:
    hub = Hub()
    endpoint = hub.bind(f"ipc://{tmp_path}/hub")
    link = hub.link(b"later", 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hub.run)
        link.put(Ping())
        await trio.sleep(0.05)
        dealer = Dealer(endpoint, b"later", 1)
        nursery.start_soon(dealer.run)
        assert await dealer.link.receive() == Ping()
        nursery.cancel_scope.cancel()
