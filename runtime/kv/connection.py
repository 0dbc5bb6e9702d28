"""A TCP connection that moves memory without copies, and seals on its messages (AES-GMAC)."""

import hashlib
import hmac
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import trio
from cryptography.hazmat.primitives.ciphers import AEADEncryptionContext, Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

_MOST_VIEWS = 512  # in one system call; the kernel takes 1,024
_WORTHWHILE_BYTES = 2**19  # a receiver waits for this many bytes, or for the rest
_STALL_S = 3.0  # without progress, after which the peer counts as gone
_BUFFER_BYTES = 4 * 2**20  # asked of the kernel, which may give less


class ConnectionBroken(ConnectionError):
    """The connection has ended, or its peer broke the protocol."""


class ConnectionStalled(ConnectionBroken):
    """The peer sent nothing, or took nothing, for `_STALL_S`."""


def no_check() -> None:
    """The `check` of memory that has no lease."""


class BlockConnection:
    """One connected socket. `check` is called right before memory is read or written; see
    Transport.

    All methods raise ConnectionBroken. After a method was cancelled, only `close` may be called.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connected.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        self._socket = connected

    async def send(
        self, views: Sequence[bytes | memoryview], check: Callable[[], None] = no_check
    ) -> None:
        """Send the bytes of `views`, in order."""
        await self._move(views, check, lambda some: self._socket.sendmsg(some), is_sending=True)

    async def fill(self, views: Sequence[memoryview], check: Callable[[], None] = no_check) -> None:
        """Receive into `views`, in order, until all are full."""

        def receive(some: list[memoryview]) -> int:
            return self._socket.recvmsg_into(some)[0]

        await self._move(views, check, receive, is_sending=False)

    async def take(self, size: int) -> bytes:
        """Receive and return `size` bytes. Meant for headers."""
        taken = bytearray(size)
        await self.fill([memoryview(taken)])
        return bytes(taken)

    def close(self) -> None:
        self._socket.close()

    async def _move(
        self,
        views: Sequence[bytes | memoryview],
        check: Callable[[], None],
        call: Callable[[list[memoryview]], int],
        *,
        is_sending: bool,
    ) -> None:
        wait = trio.lowlevel.wait_writable if is_sending else trio.lowlevel.wait_readable
        rest = deque(memoryview(view) for view in views if len(view))
        if not rest:
            await trio.lowlevel.checkpoint()
        while rest:
            check()
            try:
                num_moved = call(list(islice(rest, _MOST_VIEWS)))
            except BlockingIOError:
                if not is_sending:
                    least = min(sum(map(len, rest)), _WORTHWHILE_BYTES)
                    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
                with trio.move_on_after(_STALL_S) as stalling:
                    await wait(self._socket)
                if stalling.cancelled_caught:
                    raise ConnectionStalled(f"next to nothing passed in {_STALL_S:g} s") from None
                continue
            except OSError as error:
                raise ConnectionBroken(f"the connection ended: {error.strerror}") from None
            if num_moved == 0:
                raise ConnectionBroken("the connection was closed")
            _advance(rest, num_moved)
            await trio.lowlevel.checkpoint()


def _advance(rest: deque[memoryview], num_bytes: int) -> None:
    """Drop `num_bytes` from the front of the views."""
    while num_bytes:
        first = rest.popleft()
        if len(first) > num_bytes:
            rest.appendleft(first[num_bytes:])
            return
        num_bytes -= len(first)


def pieces_of(views: Sequence[memoryview], size: int) -> list[list[memoryview]]:
    """Split views into lists of `size` bytes each. The last list may be shorter, or empty."""
    pieces: list[list[memoryview]] = [[]]
    room = size
    for view in views:
        while view:
            if not room:
                pieces.append([])
                room = size
            pieces[-1].append(view[:room])
            view, room = view[room:], room - len(view[:room])
    return pieces


KEY_BYTES = 32
SALT_BYTES = 16
SEAL_BYTES = 16

_NONCE = struct.Struct(">8xI")
_TO_SERVER = 1 << 31  # so that the two directions never use the same number


class Seal:
    """The seal (authentication tag) of one message, computed piece by piece. Only a holder of the
    key can make it.
    """

    def __init__(self, encryptor: AEADEncryptionContext) -> None:
        self._encryptor = encryptor

    def add(self, parts: Iterable[bytes | memoryview]) -> None:
        for part in parts:
            self._encryptor.authenticate_additional_data(part)

    def end(self) -> bytes:
        self._encryptor.finalize()
        return self._encryptor.tag


class Sealer:
    """Makes the seals of one direction of one connection. Each seal has its own number, its nonce.

    Each connection has its own key, derived from the salts of both sides. Each side draws a new
    salt, so that no number is used twice with one key, whatever the peer or a man in the middle
    sends.
    """

    def __init__(self, key: bytes, salts: bytes, *, to_server: bool) -> None:
        self._key = AES(hashlib.blake2b(salts, key=key, digest_size=KEY_BYTES).digest())
        self._number = _TO_SERVER if to_server else 0

    def begin(self) -> "Seal":
        """Begin the seal of the next message, which is added in pieces."""
        nonce = _NONCE.pack(self._number)
        self._number += 1
        return Seal(Cipher(self._key, GCM(nonce)).encryptor())

    def seal(self, parts: Iterable[bytes | memoryview]) -> bytes:
        """Make the seal of the next message."""
        seal = self.begin()
        seal.add(parts)
        return seal.end()

    def is_sealed(self, seal: bytes, parts: Iterable[bytes | memoryview]) -> bool:
        """Whether `seal` is the seal of the next message."""
        return hmac.compare_digest(self.seal(parts), seal)
