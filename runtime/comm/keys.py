"""CURVE keys, which decide who may link to a graph over a network. They are created once, and kept
in a folder.

The graph has a key pair, and all workers share another pair. A worker connects only to the owner of
the graph's pair, and the graph accepts any owner of the workers' pair.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from sagellm.runtime.comm import BadKeys

LinkSide: TypeAlias = Literal["graph", "worker"]
SIDES: tuple[LinkSide, ...] = ("graph", "worker")


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """The keys of one side: its own pair, and the public key of its peer. All are Z85 text."""

    public: bytes
    secret: bytes
    peer: bytes

    def secure_server(self, socket: "zmq.Socket[bytes]") -> None:
        """Make `socket` admit only the owner of the peer's pair. The socket's context must have a
        `CurveAuthenticator`.
        """
        socket.curve_server = True
        self._show(socket)

    def secure_client(self, socket: "zmq.Socket[bytes]") -> None:
        """Make `socket` connect only to the owner of the peer's pair."""
        socket.curve_serverkey = self.peer
        self._show(socket)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the owner of the public key `key` may connect. Called in the authenticator's
        thread.
        """
        return key == self.peer

    def _show(self, socket: "zmq.Socket[bytes]") -> None:
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret


class CurveAuthenticator:
    """A ZeroMQ context whose server sockets admit only the peer of `keys`.

    The authenticator must run before a socket of the context is bound: without an authenticator,
    libzmq admits every key. Each graph has a context and an authenticator of its own, so that the
    graphs of one process can use different keys.
    """

    def __init__(self, keys: CurveKeys) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = ThreadAuthenticator(self.context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(credentials_provider=keys)

    def close(self) -> None:
        """End the context. All of its sockets must be closed before."""
        self._authenticator.stop()
        self.context.term()


def create_keys(folder: Path) -> None:
    """Create the pairs of both sides in a new folder. Raises FileExistsError, OSError."""
    folder.mkdir(mode=0o700, parents=True)
    for side in SIDES:
        _, secret = zmq.auth.create_certificates(folder, side)
        Path(secret).chmod(0o600)


def load_keys(folder: Path, side: LinkSide) -> CurveKeys:
    """Read the keys of one side. Raises BadKeys."""
    (peer,) = set(SIDES) - {side}
    own, secret = _load(folder / f"{side}.key_secret", is_secret=True)
    other, _ = _load(folder / f"{peer}.key", is_secret=False)
    return CurveKeys(own, secret, other)


def _load(path: Path, *, is_secret: bool) -> tuple[bytes, bytes]:
    try:
        is_open = path.stat().st_mode & 0o077
        public, secret = zmq.auth.load_certificate(path)
    except FileNotFoundError:
        raise BadKeys(f"there is no {path}: `sagellm keys {path.parent}` makes it") from None
    except (OSError, ValueError) as error:
        raise BadKeys(f"{path} holds no key: {type(error).__name__}") from None
    if is_secret and is_open:
        raise BadKeys(f"{path} can be read by others: chmod 600 it, or make new keys")
    for key in (public, secret):
        if key is not None and len(key) != 40:  # Z85 of 32 bytes
            raise BadKeys(f"{path} holds no key: a key has 40 characters")
    if is_secret and not secret:
        raise BadKeys(f"{path} holds no secret key")
    return public, secret or b""
