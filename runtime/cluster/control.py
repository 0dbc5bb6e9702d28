"""The control socket of a running graph, and the folder that it lies in."""

import fcntl
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import trio

from sagellm.graphs.log import get_logger

PREFIX = "sagellm-"
_LOCK = "graph.lock"


class SocketFolder:
    """Made at once, for as long as this process lives or until `remove`. Raises OSError."""

    def __init__(self) -> None:
        remove_abandoned()
        fresh = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))  # hidden until locked
        self._lock = os.open(fresh / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = fresh.rename(fresh.with_name(fresh.name.removeprefix(".")))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_abandoned() -> None:
    """Remove the folders of this user's graphs of which no process is left."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{_LOCK}"):
        with suppress(OSError), _held(lock):
            shutil.rmtree(lock.parent, ignore_errors=True)


@contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Raises OSError where the graph lives, or is another user's."""
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
_MAX_REQUEST_BYTES = 4096  # of a question
_REQUEST_TIMEOUT_S = 10.0  # for one


class ControlRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question. `operator` is a name of the graph, or all where it is None."""

    command: Literal["ps", "drain", "restart", "scale"]
    operator: str | None = None
    replica: int | None = None
    count: int | None = None  # of replicas, for `scale`


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One replica of an operator. Operators that share an engine share its worker, and its pid."""

    graph: str
    graph_pid: int  # of the process that opened it
    operator: str
    replica: int
    engine: str
    pid: int | None
    state: str
    restarts: int
    num_running: int
    num_waiting: int
    kv_ratio: float  # the share of its blocks that is leased
    why: str = ""  # its last life ended
    executor: str = "processes"


class ControlReply(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of all that were meant, after it was done; or why it was not."""

    rows: tuple[ReplicaStatus, ...] = ()
    error: str = ""


class ControlCommands(Protocol):
    """What runs one graph."""

    async def execute(self, asked: ControlRequest) -> ControlReply:
        """Answers once it is done."""


class ControlSocket:
    """Answers for the members of one graph; the socket lies in `folder`."""

    def __init__(self, members: ControlCommands, folder: Path) -> None:
        self._members = members
        self._folder = folder

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. Raises OSError where no socket can be had."""
        listening = await self.listen()
        task_status.started()
        await self.serve(listening)

    async def listen(self) -> trio.SocketListener:
        """Callers find the socket from now on. Raises OSError."""
        with ExitStack() as stack:
            bound = stack.enter_context(trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            fresh = self._folder / f"{_NAME}.new"
            await bound.bind(str(fresh))
            bound.listen(8)
            fresh.rename(self._folder / _NAME)  # any caller who finds it can connect
            stack.pop_all()
        return trio.SocketListener(bound)

    async def serve(self, listener: trio.SocketListener) -> None:
        """Until cancelled; closes the listener."""
        await trio.serve_listeners(self._serve, [listener])

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            with trio.move_on_after(_REQUEST_TIMEOUT_S) as asking:
                answer = await self._answer(stream, asking)
                with suppress(trio.BrokenResourceError):  # nobody waits for it
                    await stream.send_all(msgspec.json.encode(answer) + b"\n")

    async def _answer(self, stream: trio.SocketStream, asking: trio.CancelScope) -> ControlReply:
        """Whatever is asked, and goes wrong: the graph goes on."""
        try:
            asked = msgspec.json.decode(await _line(stream), type=ControlRequest)
        except (ValueError, trio.BrokenResourceError) as error:
            return ControlReply(error=f"not understood: {error}")
        asking.deadline = math.inf  # a restart takes its time
        try:
            return await self._members.execute(asked)
        except Exception as error:
            log.error("control_failed", command=asked.command, exc_info=error)
            return ControlReply(error=f"{asked.command} failed; see the log")


async def serve_control(
    members: ControlCommands, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """A control in a folder of its own, for a graph without workers. Where none can be made, the
    graph goes on without.
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
        with suppress(OSError):  # it has just ended, or is another user's
            if path.parent.stat().st_uid == os.getuid():
                found.append((path.stat().st_ctime, path))
    return tuple(path for _, path in sorted(found))


async def ask(path: Path, asked: ControlRequest) -> ControlReply:
    """Raises OSError where nobody listens any more; what was left of a graph without workers, which
    was killed, is removed.
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
    """Remove what a graph without workers has left; of others more lies there."""
    with suppress(OSError):
        path.unlink()
        path.parent.rmdir()


async def _line(stream: trio.SocketStream, most_bytes: int = _MAX_REQUEST_BYTES) -> bytes:
    """Raises BrokenResourceError where none comes, or one that is too long."""
    line = bytearray()
    async for part in stream:
        line += part
        if line.endswith(b"\n"):
            return bytes(line)
        if len(line) > most_bytes:
            break
    raise trio.BrokenResourceError("no line came, or one that is too long")
