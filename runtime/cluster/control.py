"""The control socket of a running graph, and the folder that holds its sockets.

The socket serves `sagellm ps`, `restart`, `drain`, `scale` and `engine`. A request and a reply are
one line of JSON each. Any process that can connect may send any request, so only this user can
access the folder.
"""

import fcntl
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import msgspec
import trio

from sagellm.graphs.log import get_logger

PREFIX = "sagellm-"
_LOCK = "graph.lock"


class SocketFolder:
    """Creates a temporary folder that only this user can access; `remove` removes it.

    If all processes of a graph are killed at once, the next graph of this user removes the folder:
    the graph's process locks a file in the folder, and the kernel releases the lock when the
    process ends. Raises OSError.
    """

    def __init__(self) -> None:
        remove_abandoned()
        # Hidden until locked, so that no other graph takes the folder for an abandoned one.
        fresh = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))
        self._lock = os.open(fresh / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = fresh.rename(fresh.with_name(fresh.name.removeprefix(".")))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_abandoned() -> None:
    """Remove the folders of this user's graphs whose processes have all ended."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{_LOCK}"):
        with suppress(OSError), _held(lock):
            shutil.rmtree(lock.parent, ignore_errors=True)


@contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Hold the lock of a folder. Raises OSError if a running graph holds it, or if the folder is
    another user's.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise PermissionError(lock)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


log = get_logger("sagellm.cluster")

_NAME = "control"
_MAX_REQUEST_BYTES = 4096
_REQUEST_TIMEOUT_S = 10.0  # until a request must have arrived, or a reply must be taken


class ControlRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request. `operator`: the name of an operator; None: all operators. `replica`: a number;
    None: all replicas.
    """

    command: Literal["ps", "drain", "restart", "scale", "servers", "register", "remove"]
    operator: str | None = None
    replica: int | None = None
    count: int | None = None  # the wanted number of replicas, for `scale`
    engine: str = ""  # for `register` and `remove`
    url: str = ""  # of the server to `register`
    force: bool = False  # whether `remove` waits for no answer


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One replica of an operator. Operators that share an engine share its worker and pid."""

    graph: str
    graph_pid: int  # of the process that opened the graph
    operator: str
    replica: int
    engine: str
    pid: int | None
    state: str
    restarts: int
    num_running: int
    num_waiting: int
    kv_ratio: float  # the share of the engine's KV blocks that are leased
    why: str = ""  # why the previous life of its worker ended; "" while the worker serves
    executor: str = "processes"


ServerState: TypeAlias = Literal["READY", "DRAINING", "STOPPED", "ERROR"]


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One server of an engine of kind `openai`. `replica`: its number, by which it is removed."""

    graph: str
    graph_pid: int
    engine: str
    replica: int
    url: str
    model: str
    state: ServerState
    num_running: int


class ControlReply(msgspec.Struct, frozen=True, kw_only=True):
    """The requested replicas or servers after the command, or the error that prevented it."""

    rows: tuple[ReplicaStatus, ...] = ()
    servers: tuple[ServerStatus, ...] = ()
    error: str = ""


class ControlCommands(Protocol):
    """Executes the commands of the control socket on one running graph."""

    async def execute(self, asked: ControlRequest) -> ControlReply:
        """Execute a request, and return when it is done. A restart may take minutes."""


class ControlSocket:
    """Serves the commands on one graph, at a socket in `folder`."""

    def __init__(self, members: ControlCommands, folder: Path) -> None:
        self._members = members
        self._folder = folder

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and serve until cancelled. Raises OSError if no socket can be bound."""
        listening = await self.listen()
        task_status.started()
        await self.serve(listening)

    async def listen(self) -> trio.SocketListener:
        """Bind the socket; clients can connect from now on. Raises OSError."""
        with ExitStack() as stack:
            bound = stack.enter_context(trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            fresh = self._folder / f"{_NAME}.new"
            await bound.bind(str(fresh))
            bound.listen(8)
            # Renamed after `listen`: any client that finds the socket can connect to it.
            fresh.rename(self._folder / _NAME)
            stack.pop_all()
        return trio.SocketListener(bound)

    async def serve(self, listener: trio.SocketListener) -> None:
        """Serve until cancelled; closes the listener."""
        await trio.serve_listeners(self._serve, [listener])

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            with trio.move_on_after(_REQUEST_TIMEOUT_S) as asking:
                answer = await self._answer(stream, asking)
                with suppress(trio.BrokenResourceError):  # the client has left
                    await stream.send_all(msgspec.json.encode(answer) + b"\n")

    async def _answer(self, stream: trio.SocketStream, asking: trio.CancelScope) -> ControlReply:
        """Receive and execute one request. Any error becomes an error reply, because a failed
        command must not end the graph.
        """
        try:
            asked = msgspec.json.decode(await _line(stream), type=ControlRequest)
        except (ValueError, trio.BrokenResourceError) as error:
            return ControlReply(error=f"not understood: {error}")
        asking.deadline = math.inf  # a command has no timeout: a restart may take minutes
        try:
            return await self._members.execute(asked)
        except Exception as error:
            log.error("control_failed", command=asked.command, exc_info=error)
            return ControlReply(error=f"{asked.command} failed; see the log")


async def serve_control(
    members: ControlCommands, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve a control socket in a new folder, for a graph without workers.

    If no folder or socket can be made, a warning is logged, and the graph runs without one.
    """
    try:
        folder = SocketFolder()
    except OSError as error:
        log.warning("control_not_open", error=str(error), fix="see that TMPDIR can be written to")
        task_status.started()
        return
    control = ControlSocket(members, folder.path)
    try:
        try:
            listening = await control.listen()
        except OSError as error:  # such as a path that is too long
            log.warning("control_not_open", error=str(error), fix="choose another TMPDIR")
            task_status.started()
            return
        task_status.started()
        await control.serve(listening)
    finally:
        folder.remove()


def running() -> tuple[Path, ...]:
    """The control sockets of this user's running graphs, oldest first."""
    found = []
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{_NAME}"):
        with suppress(OSError):  # the graph has just ended, or is another user's
            if path.parent.stat().st_uid == os.getuid():
                found.append((path.stat().st_ctime, path))
    return tuple(path for _, path in sorted(found))


async def ask(path: Path, asked: ControlRequest) -> ControlReply:
    """Send a request to a control socket, and return the reply.

    Raises OSError if no process listens at the socket. If the graph was killed, its folder is
    removed.
    """
    try:
        connected = await trio.open_unix_socket(str(path))
    except ConnectionRefusedError:
        _forget(path)
        remove_abandoned()
        raise
    async with connected as stream:
        await stream.send_all(msgspec.json.encode(asked) + b"\n")
        return msgspec.json.decode(await _line(stream, most_bytes=1 << 24), type=ControlReply)


def _forget(path: Path) -> None:
    """Remove the socket of a killed graph, and its folder if nothing else is in it."""
    with suppress(OSError):
        path.unlink()
        path.parent.rmdir()


async def _line(stream: trio.SocketStream, most_bytes: int = _MAX_REQUEST_BYTES) -> bytes:
    """Receive one line. Raises BrokenResourceError if the stream ends first, or if the line is too
    long.
    """
    line = bytearray()
    async for part in stream:
        line += part
        if line.endswith(b"\n"):
            return bytes(line)
        if len(line) > most_bytes:
            break
    raise trio.BrokenResourceError("no line came, or one that is too long")
