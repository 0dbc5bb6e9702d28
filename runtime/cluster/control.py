"""The control socket of a running graph: who works for it; restarting, draining, scaling them.

It lies in the folder of the workers' socket, which is of its user alone: who can connect may do it.
One line of JSON asks, one answers.
"""

import math
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec
import structlog
import trio

from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.cluster.faults import CannotScale, WorkerUnfit
from sagellm.runtime.cluster.supervisor import Supervisor
from sagellm.runtime.cluster.worker import Worker

log = structlog.get_logger("sagellm.cluster")

_NAME = "control"
_MOST_BYTES = 4096  # of a question
_PATIENCE_S = 10.0  # for one


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question. `operator` is a name of the graph, or all where it is None."""

    command: Literal["ps", "drain", "restart", "scale"]
    operator: str | None = None
    replica: int | None = None
    count: int | None = None  # of replicas, for `scale`


class Row(msgspec.Struct, frozen=True, kw_only=True):
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


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of all that were meant, after it was done; or why it was not."""

    rows: tuple[Row, ...] = ()
    error: str = ""


class Control:
    """Answers for one supervisor; the socket lies in `folder`."""

    def __init__(self, supervisor: Supervisor, folder: Path) -> None:
        self._supervisor = supervisor
        self._folder = folder

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await listening.bind(str(self._folder / _NAME))
        listening.listen(8)
        task_status.started()
        await trio.serve_listeners(self._serve, [trio.SocketListener(listening)])

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            with trio.move_on_after(_PATIENCE_S) as asking:
                answer = await self._answer(stream, asking)
                with suppress(trio.BrokenResourceError):  # nobody waits for it
                    await stream.send_all(msgspec.json.encode(answer) + b"\n")

    async def _answer(self, stream: trio.SocketStream, asking: trio.CancelScope) -> Answered:
        """Whatever is asked, and goes wrong: the graph goes on."""
        try:
            asked = msgspec.json.decode(await _line(stream), type=Asked)
        except (ValueError, trio.BrokenResourceError) as error:
            return Answered(error=f"not understood: {error}")
        asking.deadline = math.inf  # a restart takes its time
        try:
            return await self.obey(asked)
        except Exception as error:
            log.error("control_failed", command=asked.command, exc_info=error)
            return Answered(error=f"{asked.command} failed; see the log")

    async def obey(self, asked: Asked) -> Answered:
        rows = tuple(self._rows(asked))
        if not rows:
            return Answered(error=self._unknown(asked))
        meant = {(row.engine, row.replica) for row in rows}
        workers = [
            worker
            for worker in self._supervisor.workers
            if (worker.engine_name, worker.replica) in meant
        ]
        if asked.command == "drain":
            for worker in workers:
                self._supervisor.drain(worker)
        elif asked.command == "restart":
            await self._supervisor.restart(workers)
        elif asked.command == "scale" and asked.count is not None:
            try:
                await self._supervisor.scale(rows[0].engine, asked.count)
            except (CannotScale, WorkerUnfit) as error:
                return Answered(error=str(error))
        return Answered(rows=tuple(self._rows(asked)))

    def _rows(self, asked: Asked) -> Iterator[Row]:
        for operator, engine in self._operators.items():
            for worker in self._supervisor.workers:
                if (
                    worker.engine_name == engine
                    and asked.operator in (None, operator)
                    and asked.replica in (None, worker.replica)
                ):
                    yield self._row(operator, worker)

    def _row(self, operator: str, worker: Worker) -> Row:
        load = worker.engine.load if worker.engine else None
        return Row(
            graph=self._supervisor.graph.name,
            graph_pid=os.getpid(),
            operator=operator,
            replica=worker.replica,
            engine=worker.engine_name,
            pid=worker.pid,
            state=worker.state,
            restarts=worker.restarts.count,
            num_running=load.num_running if load else 0,
            num_waiting=load.num_waiting if load else 0,
            kv_ratio=load.num_leased_blocks / load.num_blocks if load and load.num_blocks else 0.0,
            why="" if worker.is_serving else worker.why,
        )

    @property
    def _operators(self) -> dict[str, str]:
        """Those that have an engine, and its name."""
        nodes = self._supervisor.graph.nodes
        named = {node.name: node.attrs.get("engine") for node in nodes}
        return {name: engine for name, engine in named.items() if isinstance(engine, str)}

    def _unknown(self, asked: Asked) -> str:
        known = tuple(self._operators)
        if asked.operator in known:
            return f"operator {asked.operator} has no replica {asked.replica}"
        close = nearest(asked.operator or "", known)
        hint = f"did you mean {close}?" if close else f"there are {', '.join(known)}"
        return f"no operator {asked.operator!r} has workers: {hint}"


def running() -> tuple[Path, ...]:
    """The control sockets of this user's running graphs, oldest first."""
    found = []
    for path in Path(tempfile.gettempdir()).glob(f"sagellm-*/{_NAME}"):
        with suppress(OSError):  # it has just ended, or is another user's
            if path.parent.stat().st_uid == os.getuid():
                found.append((path.stat().st_ctime, path))
    return tuple(path for _, path in sorted(found))


async def ask(path: Path, asked: Asked) -> Answered:
    """Raises OSError where nobody listens any more."""
    async with await trio.open_unix_socket(str(path)) as stream:
        await stream.send_all(msgspec.json.encode(asked) + b"\n")
        return msgspec.json.decode(await _line(stream, most_bytes=1 << 24), type=Answered)


async def _line(stream: trio.SocketStream, most_bytes: int = _MOST_BYTES) -> bytes:
    """Raises BrokenResourceError where none comes, or one that is too long."""
    line = bytearray()
    async for part in stream:
        line += part
        if line.endswith(b"\n"):
            return bytes(line)
        if len(line) > most_bytes:
            break
    raise trio.BrokenResourceError("no line came, or one that is too long")
