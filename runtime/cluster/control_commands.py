"""The commands of the control socket (ps, drain, restart, scale), for both executors."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sagellm.graphs.ir import Graph
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.cluster import CannotScale, WorkerUnfit
from sagellm.runtime.cluster.control import ControlReply, ControlRequest, ReplicaStatus
from sagellm.runtime.cluster.supervisor import Supervisor
from sagellm.runtime.cluster.worker import Worker
from sagellm.runtime.port import Engine, EngineLoad

NO_SERVERS = "no engine of this graph is of kind openai: servers belong to such an engine"
NO_WORKERS = "the graph runs in one process, without workers: serve it with --executor processes"


@dataclass(frozen=True, slots=True)
class WorkerCommands:
    """Commands on the workers of one supervisor. Implements ControlCommands."""

    supervisor: Supervisor

    async def execute(self, asked: ControlRequest) -> ControlReply:
        supervisor = self.supervisor
        if asked.command == "servers":
            return ControlReply()
        if asked.command in ("register", "remove"):
            return ControlReply(error="servers belong to graphs of the executor tasks")
        rows = tuple(self._rows(asked))
        if not rows:
            return ControlReply(error=_unknown(supervisor.graph, asked))
        meant = {(row.engine, row.replica) for row in rows}
        workers = [one for one in supervisor.workers if (one.engine_name, one.replica) in meant]
        if asked.command == "drain":
            for worker in workers:
                supervisor.drain(worker)
        elif asked.command == "restart":
            await supervisor.restart(workers)
        elif asked.command == "scale" and asked.count is not None:
            try:
                await supervisor.scale(rows[0].engine, asked.count)
            except (CannotScale, WorkerUnfit) as error:
                return ControlReply(error=str(error))
        return ControlReply(rows=tuple(self._rows(asked)))

    def _rows(self, asked: ControlRequest) -> Iterator[ReplicaStatus]:
        for operator, engine in _operators(self.supervisor.graph).items():
            for worker in self.supervisor.workers:
                if worker.engine_name == engine and _is_meant(asked, operator, worker.replica):
                    yield self._row(operator, worker)

    def _row(self, operator: str, worker: Worker) -> ReplicaStatus:
        load = worker.engine.load if worker.engine else None
        return ReplicaStatus(
            graph=self.supervisor.graph.name,
            graph_pid=os.getpid(),
            operator=operator,
            replica=worker.replica,
            engine=worker.engine_name,
            pid=worker.pid,
            state=worker.state,
            restarts=worker.restarts.count,
            num_running=load.num_running if load else 0,
            num_waiting=load.num_waiting if load else 0,
            kv_ratio=_kv_ratio(load),
            why="" if worker.is_serving else worker.ended,
        )


@dataclass(frozen=True, slots=True)
class OneProcessCommands:
    """Commands on a graph that runs in this process, without workers: only `ps` is possible.

    Implements ControlCommands.
    """

    graph: Graph
    engines: Mapping[str, Sequence[Engine]]

    async def execute(self, asked: ControlRequest) -> ControlReply:
        rows = tuple(self._rows(asked))
        if not rows and asked.operator is not None:
            return ControlReply(error=_unknown(self.graph, asked))
        if asked.command == "servers":
            return ControlReply()
        if asked.command in ("register", "remove"):
            return ControlReply(error=NO_SERVERS)
        return ControlReply(rows=rows) if asked.command == "ps" else ControlReply(error=NO_WORKERS)

    def _rows(self, asked: ControlRequest) -> Iterator[ReplicaStatus]:
        for operator, name in _operators(self.graph).items():
            for replica, engine in enumerate(self.engines.get(name, ())):
                if _is_meant(asked, operator, replica):
                    yield ReplicaStatus(
                        graph=self.graph.name,
                        graph_pid=os.getpid(),
                        operator=operator,
                        replica=replica,
                        engine=name,
                        pid=os.getpid(),
                        state="hung" if engine.health.is_hung else "ready",
                        restarts=0,
                        num_running=engine.load.num_running,
                        num_waiting=engine.load.num_waiting,
                        kv_ratio=_kv_ratio(engine.load),
                        executor="tasks",
                    )


def _operators(graph: Graph) -> dict[str, str]:
    """The name of each operator that has an engine, mapped to the engine's name."""
    named = {node.name: node.attrs.get("engine") for node in graph.nodes}
    return {name: engine for name, engine in named.items() if isinstance(engine, str)}


def _is_meant(asked: ControlRequest, operator: str, replica: int) -> bool:
    return asked.operator in (None, operator) and asked.replica in (None, replica)


def _kv_ratio(load: EngineLoad | None) -> float:
    return load.num_leased_blocks / load.num_blocks if load and load.num_blocks else 0.0


def _unknown(graph: Graph, asked: ControlRequest) -> str:
    known = tuple(_operators(graph))
    if asked.operator in known:
        return f"operator {asked.operator} has no replica {asked.replica}"
    close = nearest(asked.operator or "", known)
    hint = f"did you mean {close}?" if close else f"there are {', '.join(known)}"
    return f"no operator {asked.operator!r} has an engine: {hint}"
