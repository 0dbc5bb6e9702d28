"""The transport `tcp`: blocks through plain TCP connections, sealed chunk by chunk.

    receiver -> sender    magic 4 | version 1 | export 16 | salt 16        once
    sender -> receiver    salt 16                                          once
    receiver -> sender    chunk 4 | seal 16                                for each wanted chunk
    sender -> receiver    chunk 4 | size 8 | bytes | seal 16               for each, in order

All numbers are big-endian. Seals are keyed: each export has its own key, which the receiver gets
over the links of the graph, and from which each connection derives its key. Bytes go from the
sender's pool straight into the receiver's pool. Each piece is sealed while it is in the CPU's
cache. A chunk with a wrong seal is asked for again. Nothing is encrypted: a listener on the network
between workers sees keys and values, but can neither ask for them nor change them.
"""

import hmac
import secrets
import socket
import struct
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial

import trio

from sagellm.backends.interface import StagingBuffers
from sagellm.graphs.log import get_logger
from sagellm.runtime.kv.connection import (
    KEY_BYTES,
    SALT_BYTES,
    SEAL_BYTES,
    BlockConnection,
    ConnectionBroken,
    ConnectionStalled,
    Seal,
    Sealer,
    pieces_of,
)
from sagellm.runtime.kv.memory import PoolBytes, slices_of
from sagellm.runtime.kv.transport import MAX_COPIES, BlockLocation, LeaseCheck, TcpBlocks, damaged
from sagellm.runtime.port import DamagedBlocks, StaleLease

log = get_logger("sagellm.kv")

_MAGIC, _VERSION = b"SGKV", 2
_HELLO = struct.Struct(f">4sB16s{SALT_BYTES}s")
_ASK = struct.Struct(">I")
_HEAD = struct.Struct(">IQ")
_MAX_CONNECTIONS = 64  # served at a time; more connections wait
_MAX_STRANGERS = 64  # connections without a greeting; if there are more, the oldest is closed
_PIECE_BYTES = 2**19  # fits into a second-level cache, where the seal reads it again
_GREETING_S = 2.0  # in which a connection must greet


@dataclass(frozen=True, slots=True)
class _Export:
    key: bytes
    blocks: tuple[int, ...]
    check: LeaseCheck

    @property
    def is_over(self) -> bool:
        try:
            self.check()
        except StaleLease:
            return True
        return False


class TcpTransport:
    """Implements Transport. Listens on a free TCP port of `host`. Raises OSError."""

    def __init__(self, pool: PoolBytes, host: str) -> None:
        self.num_damaged = 0
        self._pool = pool
        self._exports: dict[bytes, _Export] = {}
        self._places = trio.Semaphore(_MAX_CONNECTIONS)
        self._strangers: list[trio.CancelScope] = []
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self._host, self._port = host, self._listener.getsockname()[1]

    async def offer(self, blocks: Sequence[int], check: LeaseCheck) -> TcpBlocks:
        await trio.lowlevel.checkpoint()
        check()
        self.drop_stale()
        name = secrets.token_bytes(16)
        export = _Export(secrets.token_bytes(KEY_BYTES), tuple(blocks), check)
        self._exports[name] = export
        return TcpBlocks(
            host=self._host, port=self._port, export=name, key=export.key, num_blocks=len(blocks)
        )

    async def fetch(self, source: BlockLocation, blocks: Sequence[int], check: LeaseCheck) -> None:
        if not isinstance(source, TcpBlocks):
            raise TypeError(f"tcp fetches from tcp, not from {type(source).__name__}")
        runs, storage = slices_of(blocks), self._pool.storage
        wanted = [
            (number, partial(storage.stage, runs, chunk))
            for number, chunk in enumerate(self._pool.chunks(len(blocks)))
        ]
        receiver = _Receiver(source, wanted, check)
        try:
            while not receiver.is_done:
                await receiver.receive()
        finally:
            self.num_damaged += receiver.num_damaged

    def drop_stale(self) -> None:
        for name, export in tuple(self._exports.items()):
            if export.is_over:
                del self._exports[name]

    async def run(self) -> None:
        self._listener.setblocking(False)
        with closing(self._listener):
            async with trio.open_nursery() as nursery:
                while True:
                    nursery.start_soon(self._serve, await self._accept())

    async def _accept(self) -> BlockConnection:
        while True:
            await trio.lowlevel.wait_readable(self._listener)
            try:
                return BlockConnection(self._listener.accept()[0])
            except BlockingIOError:
                continue
            except OSError as error:  # the peer has left, or no descriptor is free
                log.warning("kv_not_accepted", error=error.strerror)
                await trio.sleep(0.1)

    async def _serve(self, connection: BlockConnection) -> None:
        # Both errors are the receiver's to handle: it retries, or its own lease has ended too.
        with closing(connection), suppress(ConnectionBroken, StaleLease):
            hello = await self._read_hello(connection)
            if hello is not None:
                async with self._places:
                    await self._send(connection, *hello)

    async def _read_hello(self, connection: BlockConnection) -> tuple[_Export, bytes] | None:
        """Read the greeting: the wanted export, and the receiver's salt. None if the greeting is
        wrong or late.
        """
        with trio.move_on_after(_GREETING_S) as greeting:
            self._strangers.append(greeting)
            if len(self._strangers) > _MAX_STRANGERS:
                self._strangers[0].cancel()
            try:
                magic, version, name, salt = _HELLO.unpack(await connection.take(_HELLO.size))
            finally:
                self._strangers.remove(greeting)
            export = self._exports.get(name)
            if (magic, version) == (_MAGIC, _VERSION) and export is not None:
                return export, salt
        return None

    async def _send(
        self, connection: BlockConnection, export: _Export, receiver_salt: bytes
    ) -> None:
        export.check()
        salt = secrets.token_bytes(SALT_BYTES)
        await connection.send([salt])
        asks = Sealer(export.key, salt + receiver_salt, to_server=True)
        answers = Sealer(export.key, salt + receiver_salt, to_server=False)
        chunks = self._pool.chunks(len(export.blocks))
        runs = slices_of(export.blocks)
        while True:
            asked, seal = await connection.take(_ASK.size), await connection.take(SEAL_BYTES)
            (number,) = _ASK.unpack(asked)
            if not asks.is_sealed(seal, [asked]) or number >= len(chunks):
                return
            export.check()
            views = self._pool.storage.read(runs, chunks[number])
            await _send_chunk(connection, answers.begin(), number, views, export.check)


async def _send_chunk(
    connection: BlockConnection,
    seal: Seal,
    number: int,
    views: Sequence[memoryview],
    check: LeaseCheck,
) -> None:
    head = memoryview(_HEAD.pack(number, sum(map(len, views))))
    *pieces, last = pieces_of([head, *views], _PIECE_BYTES)
    for piece in pieces:
        seal.add(piece)
        await connection.send(piece, check)
        check()  # `send` had a checkpoint, and the next piece is about to be read
    seal.add(last)
    await connection.send([*last, seal.end()], check)


class _Receiver:
    """One transfer, over as many connections as it needs. `wanted`: for each chunk its number, and
    a function that returns the buffers to receive it into.
    """

    def __init__(
        self,
        source: TcpBlocks,
        wanted: Sequence[tuple[int, Callable[[], StagingBuffers]]],
        check: LeaseCheck,
    ) -> None:
        self.num_damaged = 0
        self._source = source
        self._wanted = deque(wanted)
        self._check = check
        self._num_copies: Counter[int] = Counter()
        self._num_breaks = 0

    @property
    def is_done(self) -> bool:
        return not self._wanted

    async def receive(self) -> None:
        """Receive wanted chunks over one connection, until all have come or the connection
        breaks.
        """
        with closing(await self._connect()) as connection:
            asks, answers = await self._handshake(connection)
            try:
                for number, _ in self._wanted:
                    await self._request(connection, asks, number)
                while self._wanted:
                    if not await self._receive_chunk(connection, answers):
                        await self._request(connection, asks, self._wanted[-1][0])
            except ConnectionStalled:
                raise DamagedBlocks("the sender fell silent") from None
            except ConnectionBroken:
                self._num_breaks += 1
                if self._num_breaks >= MAX_COPIES:
                    cause = "the connection to the sender broke again and again"
                    raise DamagedBlocks(cause) from None

    async def _connect(self) -> BlockConnection:
        with trio.move_on_after(_GREETING_S):
            try:
                stream = await trio.open_tcp_stream(self._source.host, self._source.port)
            except OSError:
                raise DamagedBlocks("the worker that holds the blocks cannot be reached") from None
            return BlockConnection(socket.socket(fileno=stream.socket.detach()))
        raise DamagedBlocks("the worker that holds the blocks does not answer")

    async def _handshake(self, connection: BlockConnection) -> tuple[Sealer, Sealer]:
        ours, key = secrets.token_bytes(SALT_BYTES), self._source.key
        try:
            await connection.send([_HELLO.pack(_MAGIC, _VERSION, self._source.export, ours)])
            salts = await connection.take(SALT_BYTES) + ours
        except ConnectionStalled:
            raise DamagedBlocks("the worker that holds the blocks does not answer") from None
        except ConnectionBroken:
            raise StaleLease("the lease of the blocks has ended") from None
        return Sealer(key, salts, to_server=True), Sealer(key, salts, to_server=False)

    async def _request(self, connection: BlockConnection, asks: Sealer, number: int) -> None:
        asked = _ASK.pack(number)
        await connection.send([asked + asks.seal([asked])])

    async def _receive_chunk(self, connection: BlockConnection, answers: Sealer) -> bool:
        """Receive the next chunk. Return whether its seal is right; if not, the chunk is queued
        again.
        """
        number, stage = self._wanted[0]
        staged = stage()
        views = staged.views
        expected = _HEAD.pack(number, sum(map(len, views)))
        if await connection.take(_HEAD.size) != expected:
            raise ConnectionBroken("another chunk came than was asked for")
        seal = answers.begin()
        seal.add([expected])
        for piece in pieces_of(views, _PIECE_BYTES):
            await connection.fill(piece, self._check)
            self._check()  # `fill` had a checkpoint after the last byte
            seal.add(piece)
        seal_received = await connection.take(SEAL_BYTES)
        self._wanted.popleft()
        if hmac.compare_digest(seal.end(), seal_received):
            self._check()
            staged.commit()
            return True
        self._wanted.append((number, stage))
        self._count_damage(number)
        return False

    def _count_damage(self, number: int) -> None:
        self.num_damaged += 1
        self._num_copies[number] += 1
        if self._num_copies[number] >= MAX_COPIES:
            raise damaged(self._source.num_blocks)
