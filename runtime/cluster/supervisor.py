"""The supervisor: one worker process a replica of every engine, started, watched and restarted."""

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
    """What sends requests to engines, and is told which are there."""

    def is_routed(self, engine: str) -> bool:
        """Whether it can choose among several replicas."""

    def add(self, name: str, engine: RemoteEngine) -> None:
        """One more replica; it is marked up later."""

    def mark(self, engine: str, replica: int, *, is_up: bool) -> None:
        """A replica is lost, or is back."""

    def remove(self, engine: str, replica: int) -> None:
        """One that was lost is not to come back, until it is marked up."""


class Supervisor:
    """Runs the workers of one graph. `on_change` hears of each that became ready, or is no more."""

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
        self._scaling = trio.Lock()

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Those that are wanted, engine by engine."""
        return tuple(worker for worker in self._all if worker.is_wanted)

    @property
    def engines(self) -> dict[str, tuple[RemoteEngine, ...]]:
        """By name, once `run` has started."""
        found: dict[str, tuple[RemoteEngine, ...]] = {}
        for worker in self.workers:
            assert worker.engine is not None
            found[worker.engine_name] = (*found.get(worker.engine_name, ()), worker.engine)
        return found

    @property
    def missing(self) -> dict[str, str]:
        """The engines that have no worker that serves, each with a sentence that says what is done
        about it. The sentence names no path, and nothing that an engine said: everybody may read
        it.
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
        """Tell it of every engine that is lost, back, or new."""
        self._dispatcher = dispatcher
        self.on_change = lambda worker: dispatcher.mark(
            worker.engine_name, worker.replica, is_up=worker.is_serving
        )
        for worker in self.workers:
            if not worker.is_serving:
                self.on_change(worker)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start once every worker is ready; keep them until cancelled. Then no process is left.

        Raises WorkerUnfit where one does not become ready.
        """
        async with trio.open_nursery() as launching:
            links = trio.CancelScope(shield=True)  # workers are told to stop over them
            await launching.start(self._launch, links)
            try:
                async with trio.open_nursery() as self._nursery:
                    self._prefetcher = Prefetcher(self._nursery)
                    async with trio.open_nursery() as starting:
                        for worker in self.workers:
                            starting.start_soon(self._nursery.start, self._lifecycle.keep, worker)
                    task_status.started()
            finally:
                links.cancel()

    # ---- what an operator of it asks -------------------------------------------------------

    def drain(self, worker: Worker) -> None:
        """Give it nothing new, or once it is ready where it is not yet. What runs goes on at a
        sibling, or ends here where there is none.
        """
        worker.is_to_drain = not worker.is_serving
        if worker.is_serving:
            self._set_state(worker, "drained")
            log.info("worker_drained", worker=str(worker))
            siblings = [one for one in self.workers if one.engine_name == worker.engine_name]
            if worker.engine is not None and any(one.is_serving for one in siblings):
                worker.engine.evict()

    async def restart(self, workers: Sequence[Worker]) -> None:
        """One after the other, each once the one before is ready: siblings take over meanwhile.

        It also goes on where a new life fails, is drained or is removed meanwhile.
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
            worker.leave()
            while worker.is_wanted and (  # noqa: ASYNC110
                worker.epoch == epoch or worker.state == "starting"
            ):
                await trio.sleep(self._ping_s)

    async def scale(self, engine: str, count: int) -> None:
        """Have so many replicas of an engine, from one on; returns once they are ready, or gone.

        What runs in one that goes is taken over by the others. Raises CannotScale, WorkerUnfit;
        then there are as many as before.
        """
        async with self._scaling:
            wanted = [worker for worker in self.workers if worker.engine_name == engine]
            if count < 1:
                raise CannotScale(f"engine {engine} needs a replica: drain gives it nothing new")
            if count > 1 and self._dispatcher and not self._dispatcher.is_routed(engine):
                raise CannotScale(
                    f"nothing chooses among replicas of engine {engine}: "
                    "put an operator with `op: route` before its operators"
                )
            # Those that serve, and those with low numbers, stay.
            wanted.sort(key=lambda worker: (not worker.is_serving, worker.replica))
            log.info("scaling", engine=engine, replicas=len(wanted), wanted=count)
            await self._remove(wanted[count:])
            await self._add(engine, count - len(wanted))
            log.info("scaled", engine=engine, replicas=count)

    # ---- inside ----------------------------------------------------------------------------

    def _new(self, engine: str, replica: int) -> Worker:
        return Worker(engine, replica, Restarts(self._policy))

    async def _add(self, engine: str, count: int) -> None:
        """One after the other: those that were removed before, then new ones, by their numbers."""
        assert self._nursery is not None
        added: list[Worker] = []
        try:
            while len(added) < count:
                known = [worker for worker in self._all if worker.engine_name == engine]
                worker = next((one for one in known if not one.is_wanted), None)
                if worker is None:
                    worker = self._new(engine, len(known))
                    self._all.append(worker)
                worker.want()
                added.append(worker)
                await self._nursery.start(self._lifecycle.keep, worker)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._remove(added)
            raise

    async def _remove(self, workers: Sequence[Worker]) -> None:
        """What runs there is taken over by others; returns once their processes are gone."""
        for worker in workers:
            self._set_state(worker, "removed")
            if worker.engine is not None:
                worker.engine.is_removed = True
                worker.engine.evict()
            worker.leave()
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
        """It is ready, with an engine like this: perhaps for the first time."""
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
        if worker.engine is not None:  # else nobody knows of it
            self.on_change(worker)
        self._lifecycle.limit_ejections(worker.engine_name)


def _outlook(worker: Worker) -> str:
    """What becomes of one that does not serve. The words stay while it is tried again."""
    if worker.state == "drained":
        return f"{worker} is drained"
    if worker.state == "ejected":
        return f"{worker} is left alone, as its link fails"
    if worker.restarts.is_failing:
        return f"{worker} dies again and again, and is tried again"
    return f"{worker} is started again"
