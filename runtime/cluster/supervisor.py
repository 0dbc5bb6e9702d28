"""The supervisor: runs, watches and restarts one worker for each replica of every engine."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import trio

from sagellm.backends.interface import Progress, silent
from sagellm.graphs.ir import Graph
from sagellm.graphs.log import get_logger
from sagellm.runtime.cluster import CannotScale
from sagellm.runtime.cluster.child_process import RestartPolicy, Restarts
from sagellm.runtime.cluster.launch import Launcher
from sagellm.runtime.cluster.lifecycle import WorkerLifecycle
from sagellm.runtime.cluster.worker import Watch, Worker, WorkerState
from sagellm.runtime.engine.remote_engine import RemoteEngine
from sagellm.runtime.engine.remote_kv import Prefetcher, remote_engine
from sagellm.runtime.port import EngineFacts

log = get_logger("sagellm.cluster")


class Dispatcher(Protocol):
    """Sends requests to engines. The supervisor reports to it which replicas exist, and which of
    them serve.
    """

    def is_routed(self, engine: str) -> bool:
        """Whether a `route` operator chooses among the replicas of the engine."""

    def add(self, name: str, engine: RemoteEngine) -> None:
        """Add a new replica. It gets no request until it is marked as serving."""

    def mark(self, engine: str, replica: int, *, is_up: bool) -> None:
        """Mark a replica as serving, or as lost."""

    def remove(self, engine: str, replica: int) -> None:
        """Remove a replica that was marked as lost. It may be marked as serving again later."""


class Supervisor:
    """Runs the workers of one graph. `on_change` is called after each change of a worker's state,
    with the worker.
    """

    def __init__(
        self,
        graph: Graph,
        replicas: Mapping[str, int],
        launcher: Launcher,
        *,
        watch: Watch | None = None,
        policy: RestartPolicy | None = None,
        draw: Callable[[], float] = random.random,
        progress: Progress = silent,
    ) -> None:
        self.graph = graph
        watch = watch or Watch()
        self._policy = policy or RestartPolicy()
        self._all = [
            self._new(name, replica) for name, count in replicas.items() for replica in range(count)
        ]
        self.on_change: Callable[[Worker], None] = lambda worker: None
        self._launcher = launcher
        self._lifecycle = WorkerLifecycle(
            graph,
            launcher,
            watch,
            draw,
            siblings=lambda name: [one for one in self._all if one.engine_name == name],
            set_state=self._set_state,
            on_ready=self._on_ready,
            progress=progress,
        )
        self._ping_s = watch.ping_s
        self._dispatcher: Dispatcher | None = None
        self._nursery: trio.Nursery | None = None
        self._prefetcher: Prefetcher | None = None
        self._scaling = {name: trio.Lock() for name in replicas}

    @property
    def workers(self) -> tuple[Worker, ...]:
        """The workers that are not removed, engine by engine."""
        return tuple(worker for worker in self._all if worker.is_wanted)

    @property
    def engines(self) -> dict[str, tuple[RemoteEngine, ...]]:
        """The engines by name; available after `run` has started."""
        found: dict[str, tuple[RemoteEngine, ...]] = {}
        for worker in self.workers:
            assert worker.engine is not None
            found[worker.engine_name] = (*found.get(worker.engine_name, ()), worker.engine)
        return found

    @property
    def missing(self) -> dict[str, str]:
        """The engines without a serving worker, each with a sentence on the state of its workers.

        Clients see the sentence, so it holds no path and no text of an engine.
        """
        by_engine: dict[str, list[Worker]] = {}
        for worker in self.workers:
            by_engine.setdefault(worker.engine_name, []).append(worker)
        return {
            name: f"engine {name} has no worker: {', '.join(map(_outlook, workers))}"
            for name, workers in by_engine.items()
            if not any(worker.is_serving for worker in workers)
        }

    def watch(self, dispatcher: Dispatcher) -> None:
        """Report each replica that is added, is lost, or serves again to `dispatcher`."""
        self._dispatcher = dispatcher
        self.on_change = lambda worker: dispatcher.mark(
            worker.engine_name, worker.replica, is_up=worker.is_serving
        )
        for worker in self.workers:
            if not worker.is_serving:
                self.on_change(worker)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run all workers until cancelled, and then end their processes.

        Reports `started` when all workers are ready. Raises WorkerUnfit if one does not become
        ready.
        """
        async with trio.open_nursery() as launching:
            links = trio.CancelScope(shield=True)  # stop messages need the links after a cancel
            await launching.start(self._launch, links)
            try:
                async with trio.open_nursery() as self._nursery:
                    self._prefetcher = Prefetcher(self._nursery)
                    async with trio.open_nursery() as starting:
                        for worker in self.workers:
                            starting.start_soon(self._nursery.start, self._lifecycle.run, worker)
                    task_status.started()
            finally:
                links.cancel()

    # ---- commands --------------------------------------------------------------------------

    def drain(self, worker: Worker) -> None:
        """Drain a worker: it gets no new requests. A starting worker is drained when it is ready.

        Running requests continue at a serving sibling. If there is none, they run to their end in
        this worker.
        """
        worker.is_to_drain = not worker.is_serving
        if worker.is_serving:
            self._set_state(worker, "drained")
            log.info("worker_drained", worker=str(worker))
            siblings = [one for one in self.workers if one.engine_name == worker.engine_name]
            if worker.engine is not None and any(one.is_serving for one in siblings):
                worker.engine.evict()

    async def restart(self, workers: Sequence[Worker]) -> None:
        """Restart workers one at a time: each restart begins after the previous worker is ready.

        Siblings take over the running requests. The next restart begins also if a worker does not
        become ready, because it failed or was drained or removed meanwhile.
        """
        for worker in workers:
            epoch = worker.epoch
            log.info("worker_restarting", worker=str(worker), pid=worker.pid)
            worker.restarts.reset_backoff()
            worker.is_to_drain = False
            if worker.is_serving:
                self._set_state(worker, "drained")
            if worker.engine is not None:
                worker.engine.evict()
            worker.end_life()
            while worker.is_wanted and (  # noqa: ASYNC110
                worker.epoch == epoch or worker.state == "starting"
            ):
                await trio.sleep(self._ping_s)

    async def scale(self, engine: str, count: int, *, drain_s: float = 0.0) -> None:
        """Change the number of replicas of an engine to `count`. Returns when new replicas are
        ready, and removed replicas have ended.

        Other replicas take over the requests that a removed replica has not ended after `drain_s`
        seconds. Raises CannotScale, WorkerUnfit; the number of replicas is then unchanged.
        """
        async with self._scaling[engine]:
            wanted = [worker for worker in self.workers if worker.engine_name == engine]
            if count < 1:
                raise CannotScale(f"engine {engine} needs a replica: drain gives it nothing new")
            if count > 1 and self._dispatcher and not self._dispatcher.is_routed(engine):
                raise CannotScale(
                    f"nothing chooses among replicas of engine {engine}: "
                    "put an operator with `op: route` before its operators"
                )
            # Keep workers that serve, and workers with low numbers.
            wanted.sort(key=lambda worker: (not worker.is_serving, worker.replica))
            log.info("scaling", engine=engine, replicas=len(wanted), wanted=count)
            await self._finish(wanted[count:], drain_s)
            await self._remove(wanted[count:])
            await self._add(engine, count - len(wanted))
            log.info("scaled", engine=engine, replicas=count)

    # ---- inside ----------------------------------------------------------------------------

    def _new(self, engine: str, replica: int) -> Worker:
        return Worker(engine, replica, Restarts(self._policy))

    async def _add(self, engine: str, count: int) -> None:
        """Add `count` workers one at a time: first workers that were removed earlier, and then new
        workers. If one fails, remove those that were added.
        """
        assert self._nursery is not None
        added: list[Worker] = []
        try:
            while len(added) < count:
                known = [worker for worker in self._all if worker.engine_name == engine]
                worker = next((one for one in known if not one.is_wanted), None)
                if worker is None:
                    worker = self._new(engine, len(known))
                    self._all.append(worker)
                worker.reset()
                added.append(worker)
                await self._nursery.start(self._lifecycle.run, worker)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._remove(added)
            raise

    async def _finish(self, workers: Sequence[Worker], drain_s: float) -> None:
        """Give workers no new requests, and wait until they have ended theirs, or for `drain_s`."""
        with trio.move_on_after(drain_s):
            for worker in workers if drain_s else ():
                if worker.is_serving:
                    self._set_state(worker, "drained")
            while any(one.state == "drained" and not _is_idle(one) for one in workers):  # noqa: ASYNC110
                await trio.sleep(self._ping_s)

    async def _remove(self, workers: Sequence[Worker]) -> None:
        """Remove workers; other workers take over their requests. Returns when the processes of the
        removed workers have ended.
        """
        for worker in workers:
            self._set_state(worker, "removed")
            if worker.engine is not None:
                worker.engine.is_removed = True
                worker.engine.evict()
            worker.end_life()
        for worker in workers:
            await worker.gone.wait()
            if self._dispatcher is not None and worker.engine is not None:
                self._dispatcher.remove(worker.engine_name, worker.replica)

    async def _launch(
        self,
        scope: trio.CancelScope,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with scope:
            await self._launcher.run(task_status)

    def _on_ready(self, worker: Worker, facts: EngineFacts) -> None:
        """Make the engine of a worker that became ready for the first time, and add the engine to
        the dispatcher. Later lives use the same engine.
        """
        if worker.engine is not None:
            return
        worker.engine = remote_engine(
            facts,
            name=worker.engine_name,
            replica=worker.replica,
            on_change=lambda is_up: self._set_state(worker, "ready" if is_up else "dead"),
            prefetcher=self._prefetcher,
        )
        if self._dispatcher is not None:
            self._dispatcher.add(worker.engine_name, worker.engine)

    def _set_state(self, worker: Worker, state: WorkerState) -> None:
        if state == "ready" and worker.is_to_drain:
            state, worker.is_to_drain = "drained", False
        if worker.state == state:
            return
        if worker.is_wanted:
            worker.state = state
        if worker.engine is not None:  # else the dispatcher does not know the replica yet
            self.on_change(worker)
        self._lifecycle.limit_ejections(worker.engine_name)


def _is_idle(worker: Worker) -> bool:
    return worker.engine is None or worker.engine.is_idle


def _outlook(worker: Worker) -> str:
    """A text on what happens to a worker that does not serve. It does not change with the number of
    restarts.
    """
    if worker.state == "drained":
        return f"{worker} is drained"
    if worker.state == "ejected":
        return f"{worker} is left alone, as its link fails"
    if worker.restarts.is_failing:
        return f"{worker} dies again and again, and is tried again"
    return f"{worker} is started again"
