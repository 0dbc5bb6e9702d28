"""KV over tcp: bytes that were changed, cut or replayed are noticed, and never served."""

import pickle
import secrets
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
import trio
from kv_sender import opened
from toxic_proxy import Toxic, ToxicProxy, cutting, flipping

from sagellm.runtime.kv import connection, memory, tcp
from sagellm.runtime.kv.connection import KEY_BYTES, SALT_BYTES, Sealer, pieces_of
from sagellm.runtime.kv.transport import TcpBlocks
from sagellm.runtime.port import DamagedBlocks, StaleLease

SENT = [3, 4, 5, 9, 8, 20, 21, 60]
LANDED = [1, 2, 3, 4, 5, 40, 41, 42]
CHUNK = 4 + 8 + 16 + 2 * 8 * 256  # one layer: header, keys and values of eight blocks, seal
SALT = 16
ALL = SALT + 3 * CHUNK


def fine() -> None:
    """A lease that is held."""


class Tcp:
    """A pool that sends through a proxy, and one that receives."""

    def __init__(self) -> None:
        self.sent, self.sender = opened("tcp", seed=1)
        self.landed, self.receiver = opened("tcp", seed=None, num_blocks=48)
        self.proxy = ToxicProxy("127.0.0.1", 0)

    async def offer(self) -> TcpBlocks:
        source = await self.sender.offer(SENT, fine)
        assert isinstance(source, TcpBlocks)
        self.proxy.port = source.port
        return msgspec.structs.replace(source, port=self.proxy.listens_at)

    @property
    def is_right(self) -> bool:
        others = [block for block in range(48) if block not in LANDED]
        arrived = np.array_equal(self.landed.pool[:, :, LANDED], self.sent.pool[:, :, SENT])
        return arrived and not self.landed.pool[:, :, others].any()


@pytest.fixture(params=[2**19, 1000], ids=["in one piece", "in pieces"])
async def ends(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Tcp]:
    monkeypatch.setattr(memory, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(tcp, "_PIECE_BYTES", request.param)
    both = Tcp()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(both.sender.run)
        nursery.start_soon(both.receiver.run)
        await nursery.start(both.proxy.run)
        yield both
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "at", [*range(SALT, ALL, 997), *(SALT + at for at in (4, 11, 12, 27)), ALL - 1]
)
async def test_one_flipped_bit_is_noticed_and_sent_again(at: int, ends: Tcp) -> None:
    ends.proxy.answers = [flipping(at)]
    await ends.receiver.fetch(await ends.offer(), LANDED, fine)
    assert ends.is_right
    in_header = (at - SALT) % CHUNK < 12  # then it is not known where the next chunk begins
    assert ends.receiver.num_damaged == (0 if in_header else 1)
    assert len(ends.proxy.seen) == (2 if in_header else 1)
    if not in_header:
        assert len(ends.proxy.seen[0]) == ALL + CHUNK  # this chunk again, and no other


@pytest.mark.parametrize("at", [0, 15, 16, 28, 44, 45, CHUNK, CHUNK + 17, ALL - 1])
async def test_a_connection_that_breaks_goes_on_where_it_was(at: int, ends: Tcp) -> None:
    ends.proxy.answers = [cutting(at)]
    if at < SALT:  # before the receiver knows that there is a lease at all
        with pytest.raises(StaleLease):
            await ends.receiver.fetch(await ends.offer(), LANDED, fine)
        return
    await ends.receiver.fetch(await ends.offer(), LANDED, fine)
    assert ends.is_right
    arrived = (at - SALT) // CHUNK
    assert len(ends.proxy.seen[1]) == SALT + (3 - arrived) * CHUNK


async def test_what_stays_damaged_is_an_error(ends: Tcp) -> None:
    def flip_all(so_far: int, data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1]) if so_far + len(data) > 100 else data

    ends.proxy.answers = [flip_all] * 9
    with pytest.raises((DamagedBlocks, StaleLease)):
        await ends.receiver.fetch(await ends.offer(), LANDED, fine)


@pytest.mark.parametrize("at", [0, SALT, SALT + CHUNK + 7], ids=["greeting", "chunk", "midway"])
async def test_a_connection_that_swallows_bytes_is_given_up_once(
    at: int, ends: Tcp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver does not wait for a second connection: the blocks can be computed elsewhere."""
    monkeypatch.setattr(connection, "_STALL_S", 0.05)

    def swallow(so_far: int, data: bytes) -> bytes:
        return data[: max(0, at - so_far)]

    ends.proxy.answers = [swallow] * 9
    with trio.fail_after(2), pytest.raises(DamagedBlocks):
        await ends.receiver.fetch(await ends.offer(), LANDED, fine)
    assert len(ends.proxy.seen) == 1


def replaying(recorded: bytes) -> Toxic:
    """Send the salt, and then the bytes of another connection."""
    said = bytearray(recorded)

    def replay(so_far: int, data: bytes) -> bytes:
        fresh = data[: max(0, SALT - so_far)]
        rest = min(len(data) - len(fresh), len(said))
        old, said[:rest] = bytes(said[:rest]), b""
        return fresh + old + data[len(fresh) + rest :]

    return replay


def swapping(so_far: int, data: bytes) -> bytes:
    """The first two chunks in the other order, which the kernel happens to give in one piece."""
    if len(data) != ALL:
        return data
    cuts = (0, SALT, SALT + CHUNK, SALT + 2 * CHUNK, ALL)
    salt, one, two, rest = (data[start:end] for start, end in pairwise(cuts))
    return salt + two + one + rest


async def test_chunks_of_another_transfer_are_refused(ends: Tcp) -> None:
    """Another export, as large, of other blocks: its chunks have the right form and size."""
    await ends.receiver.fetch(await ends.offer(), LANDED, fine)
    recorded = bytes(ends.proxy.seen[0][SALT:])
    ends.landed.pool.fill(0)
    ends.sent.pool += 1
    ends.proxy.answers = [replaying(recorded)]
    await ends.receiver.fetch(await ends.offer(), LANDED, fine)
    assert ends.is_right
    assert ends.receiver.num_damaged == 3


@pytest.mark.parametrize("ends", [2**19], indirect=True)
async def test_chunks_in_another_order_are_refused(ends: Tcp) -> None:
    ends.proxy.answers = [swapping]
    await ends.receiver.fetch(await ends.offer(), LANDED, fine)
    assert ends.is_right


def greetings(source: TcpBlocks) -> dict[str, bytes]:
    hello = tcp._HELLO.pack(b"SGKV", tcp._VERSION, source.export, bytes(16))
    ask = tcp._ASK.pack(0)
    return {
        "nothing": b"",
        "garbage": secrets.token_bytes(4096),
        "pickle": pickle.dumps({"a": 1}) * 40,
        "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "another version": tcp._HELLO.pack(b"SGKV", 1, source.export, bytes(16)) + ask + bytes(16),
        "an unknown export": tcp._HELLO.pack(b"SGKV", tcp._VERSION, bytes(16), bytes(16))
        + ask
        + bytes(16),
        "no seal": hello + ask + bytes(16),
        "another's seal": hello + ask + secrets.token_bytes(16),
        "no such chunk": hello + tcp._ASK.pack(2**32 - 1) + bytes(16),
    }


@pytest.mark.parametrize("kind", ["nothing", "garbage", "pickle", "http", "another version",
                                  "an unknown export", "no seal", "another's seal",
                                  "no such chunk"])  # fmt: skip
async def test_strangers_learn_nothing_and_harm_nobody(
    kind: str, ends: Tcp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "_GREETING_S", 0.2)
    source = await ends.offer()
    heard = bytearray()
    async with await trio.open_tcp_stream("127.0.0.1", ends.proxy.port) as stream:
        await stream.send_all(greetings(source)[kind])
        with trio.fail_after(5):
            try:
                async for data in stream:
                    heard.extend(data)
            except trio.BrokenResourceError:
                pass
    assert len(heard) <= SALT  # a salt
    await ends.receiver.fetch(source, LANDED, fine)
    assert ends.is_right


async def test_strangers_that_say_nothing_keep_nobody_out(ends: Tcp) -> None:
    source = await ends.offer()
    strangers = []
    for _ in range(3 * tcp._MAX_STRANGERS):
        strangers.append(await trio.open_tcp_stream("127.0.0.1", ends.proxy.port))
    with trio.fail_after(tcp._GREETING_S / 2):
        await ends.receiver.fetch(source, LANDED, fine)
    assert ends.is_right
    for stream in strangers:
        await stream.aclose()


def test_pieces_are_all_of_it_in_order() -> None:
    data = memoryview(bytes(range(100)))
    views = [data[:1], data[1:50], data[50:50], data[50:64], data[64:]]
    for size in (1, 7, 50, 99, 100, 101):
        pieces = pieces_of(views, size)
        assert b"".join(view for piece in pieces for view in piece) == data
        assert [sum(map(len, piece)) for piece in pieces[:-1]] == [size] * (len(pieces) - 1)
    assert pieces_of([], 5) == [[]]


def test_a_salt_that_comes_again_gives_no_key_again() -> None:
    """A man in the middle may repeat the sender's salt; the receiver's salt is new."""
    key, salt = secrets.token_bytes(KEY_BYTES), secrets.token_bytes(SALT_BYTES)
    seals = {
        Sealer(key, salt + secrets.token_bytes(SALT_BYTES), to_server=False).seal([b"chunk"])
        for _ in range(100)
    }
    assert len(seals) == 100


def test_a_key_is_never_shown() -> None:
    key = secrets.token_bytes(32)
    told: Any = TcpBlocks(host="h", port=1, export=b"e", key=key, num_blocks=3)
    assert key.hex() not in repr(told)
    assert repr(key) not in repr(told)
