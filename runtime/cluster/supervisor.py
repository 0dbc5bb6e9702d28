"""The supervisor: one worker process a replica of every engine, started, watched and restarted."""

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

import structlog
import trio

from sagellm.graphs.ir import Graph
from sagellm.graphs.text.codec import to_msgpack
from sagellm.runtime.cluster.backoff import RestartPolicy, Restarts
from sagellm.runtime.cluster.faults import WorkerUnfit
from sagellm.runtime.cluster.launch import Launcher, Life
from sagellm.runtime.cluster.worker import Watch, Worker, WorkerState
from sagellm.runtime.comm.channel import Channel, ChannelClosed
from sagellm.runtime.comm.protocol import Open, Ping, Ready, Stop, Unfit
from sagellm.runtime.engine.remote import RemoteEngine

log = structlog.get_logger("sagellm.cluster")


class Mark(Protocol):
    def __call__(self, engine: str, replica: int, *, is_up: bool) -> None: ...


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
    ) -> None:
        self.graph = graph
        self.workers = tuple(
            Worker(name, replica, Restarts(policy or RestartPolicy()))
            for name, count in replicas.items()
            for replica in range(count)
        )
        self.on_change: Callable[[Worker], None] = lambda worker: None
        self._launcher = launcher
        self._watch = watch or Watch()
        self._draw = draw

    @property
    def engines(self) -> dict[str, tuple[RemoteEngine, ...]]:
        """By name, once `run` has started."""
        found: dict[str, tuple[RemoteEngine, ...]] = {}
        for worker in self.workers:
            assert worker.engine is not None
            found[worker.engine_name] = (*found.get(worker.engine_name, ()), worker.engine)
        return found

    def watch(self, mark: Mark) -> None:
        """Tell `mark(engine, replica, is_up=...)` of every engine that is lost, or back."""
        self.on_change = lambda worker: mark(
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
                async with trio.open_nursery() as nursery:
                    async with trio.open_nursery() as starting:
                        for worker in self.workers:
                            starting.start_soon(nursery.start, self._keep, worker)
                    task_status.started()
            finally:
                links.cancel()

    # ---- what an operator of it asks -------------------------------------------------------

    def drain(self, worker: Worker) -> None:
        """Give it nothing new. What runs goes on at a sibling, or ends here where there is none."""
        if worker.is_serving:
            self._turn(worker, "drained")
            siblings = [one for one in self.workers if one.engine_name == worker.engine_name]
            if worker.engine is not None and any(one.is_serving for one in siblings):
                worker.engine.evict()

    async def restart(self, workers: Sequence[Worker]) -> None:
        """One after the other, each once the one before is ready: siblings take over meanwhile."""
        for worker in workers:
            epoch = worker.epoch
            worker.restarts.forgive()
            if worker.is_serving:
                self._turn(worker, "drained")
            if worker.engine is not None:
                worker.engine.evict()
            worker.leave()
            while worker.epoch == epoch or worker.state not in ("ready", "failed"):  # noqa: ASYNC110
                await trio.sleep(self._watch.ping_s)

    # ---- inside ----------------------------------------------------------------------------

    async def _launch(
        self,
        scope: trio.CancelScope,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with scope:
            await self._launcher.run(task_status)

    async def _keep(
        self, worker: Worker, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """One life after the other."""
        while True:
            worker.stirred = trio.Event()
            ready_s = await self._live(worker, task_status)
            if worker.engine is None:
                raise WorkerUnfit(f"engine {worker}: {worker.why}")
            if worker.is_leaving:
                worker.is_leaving = False
                continue
            delay_s = worker.restarts.died(trio.current_time(), ready_s=ready_s, draw=self._draw())
            log.warning("worker_died", worker=str(worker), why=worker.why, restart_in_s=delay_s)
            if delay_s is None:
                self._turn(worker, "failed")
                await worker.stirred.wait()
            else:
                with trio.move_on_after(delay_s):
                    await worker.stirred.wait()

    async def _live(self, worker: Worker, task_status: trio.TaskStatus[None]) -> float | None:
        """One life; when it became ready, if it did."""
        worker.epoch += 1
        worker.state, worker.why = "starting", "it ended"
        ready_s = None
        try:
            life = self._launcher.launch(worker.epoch)
        except OSError as error:  # no memory, or too many processes
            worker.why = f"it could not be started: {error.strerror}"
            return None
        worker.pid = life.pid
        try:
            async with trio.open_nursery() as nursery:
                worker.life = nursery.cancel_scope
                nursery.start_soon(self._await_end, worker, life, nursery.cancel_scope)
                if await self._open(worker, life.channel):
                    ready_s = trio.current_time()
                    assert worker.engine is not None
                    nursery.start_soon(self._ask, worker, life.channel, nursery.cancel_scope)
                    if worker.epoch == 1:
                        task_status.started()
                    worker.why = await worker.engine.live(life.channel)
                nursery.cancel_scope.cancel()
        finally:
            worker.life = None
            with trio.CancelScope(shield=True):
                await self._end(worker, life)
        return ready_s

    async def _open(self, worker: Worker, channel: Channel) -> bool:
        """Whether it became ready."""
        opening = Open(
            graph=to_msgpack(self.graph),
            engine=worker.engine_name,
            replica=worker.replica,
            num_blocks=worker.engine.facts.num_blocks if worker.engine else None,
        )
        channel.put(opening)
        worker.why = f"it was not ready within {self._watch.start_s:g} s"
        with trio.move_on_after(self._watch.start_s):
            try:
                answer = await channel.receive()
            except ChannelClosed as error:
                worker.why = str(error)
                return False
            if isinstance(answer, Unfit):
                worker.why = answer.error
            if isinstance(answer, Ready):
                worker.why = "it ended"
                if worker.engine is None:
                    worker.engine = RemoteEngine(
                        answer.facts,
                        name=worker.engine_name,
                        replica=worker.replica,
                        on_change=lambda is_up: self._turn(worker, "ready" if is_up else "dead"),
                    )
                return True
        return False

    async def _await_end(self, worker: Worker, life: Life, scope: trio.CancelScope) -> None:
        code = await life.wait()
        worker.why = f"signal {-code}" if code < 0 else f"exit code {code}"
        scope.cancel()

    async def _ask(self, worker: Worker, channel: Channel, scope: trio.CancelScope) -> None:
        """Ask for signs of life; end a life that gives none, or whose engine is hung."""
        assert worker.engine is not None
        since_s = moved_s = trio.current_time()
        while True:
            asked_s = trio.current_time()
            with suppress(ChannelClosed):
                channel.put(Ping())
            await trio.sleep(self._watch.ping_s)
            now = trio.current_time()
            if now - asked_s > self._watch.ping_s + self._watch.silent_s / 2:
                since_s = now  # it was us who did not listen
            silent_s = now - max(channel.heard_s, since_s)
            if silent_s > self._watch.silent_s:
                worker.why = f"no sign of life for {silent_s:.1f} s"
                scope.cancel()
            if not worker.engine.health.is_hung:
                moved_s = now
            if now - moved_s > self._watch.hang_s:
                worker.why = "its engine hung"
                scope.cancel()

    async def _end(self, worker: Worker, life: Life) -> None:
        """End the worker, in order where nothing is wrong with it; its life is heard no more."""
        if worker.why == "it ended":
            with suppress(ChannelClosed):
                life.channel.put(Stop())
            with trio.move_on_after(self._watch.stop_s):
                await life.wait()
        life.kill()
        await life.wait()
        life.close()
        worker.pid = None

    def _turn(self, worker: Worker, state: WorkerState) -> None:
        worker.state = state
        self.on_change(worker)
