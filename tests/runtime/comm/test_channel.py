"""One contract for every channel: messages in order, each once; signs of life; a noticed end."""

import pickle
import secrets
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import zmq

from sagellm.runtime.comm import BadKeys
from sagellm.runtime.comm.channel import (
    MAX_FRAME_BYTES,
    SOCKET_CAPACITY,
    Channel,
    ChannelClosed,
    Frame,
    encode,
    memory_channels,
)
from sagellm.runtime.comm.keys import CurveKeys, create_keys, load_keys
from sagellm.runtime.comm.protocol import Cancel, Done, Ping, Pong
from sagellm.runtime.comm.zeromq import Dealer, Hub
from sagellm.runtime.port import EngineHealth, EngineLoad

PONG = Pong(load=EngineLoad(), health=EngineHealth())


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def cancel(number: int) -> Cancel:
    return Cancel(request_id="r", choice=number, epoch=0)


class Zeromq:
    """A hub with one announced peer, and that peer; over tcp with keys."""

    def __init__(self, folder: Path, *, is_tcp: bool = False) -> None:
        hub_keys = worker_keys = None
        if is_tcp:
            create_keys(folder / "keys")
            hub_keys = load_keys(folder / "keys", "graph")
            worker_keys = load_keys(folder / "keys", "worker")
        self.hub = Hub(hub_keys)
        self.endpoint = self.hub.bind("tcp://127.0.0.1:0" if is_tcp else f"ipc://{folder}/hub")
        self.name = secrets.token_bytes(16)
        self.link = self.hub.link(self.name, 3)
        self.dealer = Dealer(self.endpoint, self.name, 3, worker_keys)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Zeromq"]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.hub.run)
            nursery.start_soon(self.dealer.run)
            yield self
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def stranger(
        self, name: bytes, keys: CurveKeys | None = None
    ) -> AsyncIterator["zmq.Socket[bytes]"]:
        dealer = zmq.Context.instance().socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, name)
        if keys is not None:
            keys.secure_client(dealer)
        dealer.connect(self.endpoint)
        try:
            yield dealer
        finally:
            dealer.close(linger=0)


@pytest.fixture
async def zeromq(tmp_path: Path) -> AsyncIterator[Zeromq]:
    async with Zeromq(tmp_path).running() as running:
        yield running


@pytest.fixture
async def tcp(tmp_path: Path) -> AsyncIterator[Zeromq]:
    async with Zeromq(tmp_path, is_tcp=True).running() as running:
        yield running


@pytest.fixture(params=["memory", "ipc", "tcp"])
async def sides(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[tuple[Channel, Channel]]:
    """The graph's, and the worker's."""
    if request.param == "memory":
        yield memory_channels()
        return
    async with Zeromq(tmp_path, is_tcp=request.param == "tcp").running() as running:
        yield running.link, running.dealer.link


async def test_messages_come_in_order_and_once(sides: tuple[Channel, Channel]) -> None:
    graph, worker = sides
    for number in range(SOCKET_CAPACITY // 2):
        graph.put(cancel(number))
    for number in range(100):
        worker.put(Done(call=number))
    assert [await worker.receive() for _ in range(SOCKET_CAPACITY // 2)] == [
        *map(cancel, range(SOCKET_CAPACITY // 2))
    ]
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
    assert graph.last_received_s < before
    worker.put(PONG)
    await graph.receive()
    assert before <= graph.last_received_s <= trio.current_time()


async def test_a_closed_side_says_and_hears_nothing(sides: tuple[Channel, Channel]) -> None:
    graph, worker = sides
    worker.put(PONG)
    with trio.fail_after(10):
        while graph.last_received_s < 0:  # noqa: ASYNC110 - it is not received yet
            await trio.sleep(0.01)
    graph.close("it was enough")
    assert await graph.receive() == PONG  # what came before the end
    with pytest.raises(ChannelClosed, match="enough"):
        await graph.receive()
    with pytest.raises(ChannelClosed, match="enough"):
        graph.put(Ping())
    worker.put(PONG)  # no message told the other side
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
        for number in range(400 * SOCKET_CAPACITY):  # the kernel holds some, over tcp
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
    assert zeromq.hub.num_rejected == 1


@pytest.mark.parametrize("kind", garbage())
async def test_garbage_of_the_hub_is_dropped(zeromq: Zeromq, kind: str) -> None:
    zeromq.dealer.link.put(PONG)  # so that the hub knows it
    await zeromq.link.receive()
    zeromq.hub._port.send([zeromq.name, garbage()[kind]])
    zeromq.link.put(Ping())
    assert await zeromq.dealer.link.receive() == Ping()


async def test_a_stranger_is_not_heard(zeromq: Zeromq) -> None:
    async with zeromq.stranger(b"somebody") as stranger:
        stranger.send(encode(Frame(3, 0, msgspec.msgpack.encode(PONG))))
        with trio.fail_after(5):
            while not zeromq.hub.num_rejected:  # noqa: ASYNC110 - of another thread
                await trio.sleep(0.01)
    zeromq.dealer.link.put(PONG)
    assert await zeromq.link.receive() == PONG


async def test_a_frame_that_is_too_long_drops_its_sender_only(zeromq: Zeromq) -> None:
    async with zeromq.stranger(b"somebody") as stranger:
        stranger.send(bytes(MAX_FRAME_BYTES + 1))
        await trio.sleep(0.1)
    zeromq.dealer.link.put(PONG)
    assert await zeromq.link.receive() == PONG


@pytest.mark.parametrize("number", [1, 2**63])
async def test_a_gap_ends_the_link(zeromq: Zeromq, number: int) -> None:
    said = msgspec.msgpack.encode(PONG)
    zeromq.dealer._port.socket.send(encode(Frame(3, number, said)))
    with pytest.raises(ChannelClosed, match="was due"):
        await zeromq.link.receive()


async def test_a_gap_that_is_seen_while_sending_ends_the_link_alone(zeromq: Zeromq) -> None:
    zeromq.dealer._port.socket.send(encode(Frame(3, 5, msgspec.msgpack.encode(PONG))))
    time.sleep(0.1)  # noqa: ASYNC251 - the loop must not run meanwhile
    zeromq.link.put(Ping())
    with pytest.raises(ChannelClosed, match="was due"):
        zeromq.link.put(Ping())


async def test_what_comes_while_somebody_sends_is_taken(zeromq: Zeromq) -> None:
    for number in range(600):
        frame = encode(Frame(3, number, msgspec.msgpack.encode(Done(call=number))))
        zeromq.dealer._port.socket.send(frame)
    time.sleep(0.2)  # noqa: ASYNC251 - one long turn of the loop
    zeromq.link.put(Ping())
    with trio.fail_after(2):
        assert [await zeromq.link.receive() for _ in range(600)] == [
            Done(call=number) for number in range(600)
        ]


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
async def test_addresses_may_be_of_ipv6() -> None:
    hub = Hub()
    endpoint = hub.bind("tcp://[::1]:0")
    link, dealer = hub.link(b"six", 1), Dealer(endpoint, b"six", 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hub.run)
        nursery.start_soon(dealer.run)
        link.put(Ping())
        assert await dealer.link.receive() == Ping()
        nursery.cancel_scope.cancel()


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


# ---- over tcp only -------------------------------------------------------------------------


def stolen(folder: Path) -> dict[str, CurveKeys | None]:
    """Keys of an attacker who knows the address, the name and the public keys, but no secret."""
    create_keys(folder / "others")
    graph, worker = (load_keys(folder / "keys", side) for side in ("graph", "worker"))
    others = load_keys(folder / "others", "worker")
    return {
        "no keys": None,
        "keys of another graph": others,
        "a pair of their own": CurveKeys(others.public, others.secret, graph.public),
        "the graph's own pair": CurveKeys(graph.public, graph.secret, graph.public),
        "half of a pair": CurveKeys(worker.public, others.secret, graph.public),
    }


@pytest.mark.parametrize(
    "has",
    [
        "no keys",
        "keys of another graph",
        "a pair of their own",
        "the graph's own pair",
        "half of a pair",
    ],
)
async def test_who_has_no_key_is_not_let_in(has: str, tcp: Zeromq, tmp_path: Path) -> None:
    async with tcp.stranger(tcp.name, stolen(tmp_path)[has]) as stranger:
        frame = encode(
            Frame(3, 0, msgspec.msgpack.encode(Cancel(request_id="r", choice=0, epoch=0)))
        )
        with suppress(zmq.Again):
            stranger.send(frame, zmq.NOBLOCK)
        tcp.dealer.link.put(PONG)
        assert await tcp.link.receive() == PONG
        await trio.sleep(0.1)
        assert stranger.poll(0) == 0
    assert tcp.hub.num_rejected == 0  # what it sent was never read


async def test_what_is_said_over_tcp_cannot_be_read(tmp_path: Path) -> None:
    said = "a prompt that nobody else reads"
    heard = bytearray()
    secured = Zeromq(tmp_path, is_tcp=True)
    port = int(secured.endpoint.rsplit(":", 1)[1])

    async def eavesdrop(stream: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream("127.0.0.1", port) as onward:

            async def copy(source: trio.SocketStream, sink: trio.SocketStream) -> None:
                with suppress(trio.BrokenResourceError):
                    async for data in source:
                        heard.extend(data)
                        await sink.send_all(data)

            async with trio.open_nursery() as both:
                both.start_soon(copy, stream, onward)
                both.start_soon(copy, onward, stream)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, eavesdrop, [listener])
        between = f"tcp://127.0.0.1:{listener.socket.getsockname()[1]}"
        name = secrets.token_bytes(16)
        link = secured.hub.link(name, 1)
        dealer = Dealer(between, name, 1, load_keys(tmp_path / "keys", "worker"))
        nursery.start_soon(secured.hub.run)
        nursery.start_soon(secured.dealer.run)
        nursery.start_soon(dealer.run)
        link.put(Cancel(request_id=said, choice=0, epoch=0))
        assert await dealer.link.receive() == Cancel(request_id=said, choice=0, epoch=0)
        assert len(heard) > 100
        assert said.encode() not in heard
        nursery.cancel_scope.cancel()


def test_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    create_keys(tmp_path / "keys")
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    secret = tmp_path / "keys" / "graph.key_secret"
    secret.chmod(0o640)
    with pytest.raises(BadKeys, match="can be read by others"):
        load_keys(tmp_path / "keys", "graph")


@pytest.mark.parametrize("text", ["", "nothing", 'curve\n  public-key = "short"\n'])
def test_what_is_no_key_is_refused(text: str, tmp_path: Path) -> None:
    create_keys(tmp_path / "keys")
    (tmp_path / "keys" / "worker.key").write_text(text)
    with pytest.raises(BadKeys, match="no key"):
        load_keys(tmp_path / "keys", "graph")


def test_keys_that_are_not_there_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(BadKeys, match="sagellm keys"):
        load_keys(tmp_path, "graph")
