"""The lifecycle of a worker: the worker is started, watched, ended, and restarted."""

import signal
from collections.abc import Callable, Sequence
from contextlib import suppress

import trio
from msgspec.structs import replace

from sagellm.backends.interface import Loading, Progress, ProgressEvent, silent
from sagellm.graphs.ir import Graph
from sagellm.graphs.log import get_logger
from sagellm.graphs.text.codec import to_msgpack
from sagellm.runtime.cluster import NoResources, WorkerUnfit
from sagellm.runtime.cluster.child_process import Blame
from sagellm.runtime.cluster.launch import Launcher, Life
from sagellm.runtime.cluster.worker import Suspects, Watch, Worker, WorkerState
from sagellm.runtime.comm.channel import Channel, ChannelClosed
from sagellm.runtime.comm.protocol import Open, Ping, Ready, Starting, Stop, Unfit
from sagellm.runtime.port import EngineFacts
from sagellm.runtime.prefixes import hash_secret

log = get_logger("sagellm.cluster")


class WorkerLifecycle:
    """Runs the workers of one graph, each in its own task.

    `siblings(engine)` returns all workers of an engine. `set_state` sets a worker's state.
    `on_ready` is called with a worker that became ready and the facts of its engine; it must set
    `worker.engine`.
    """

    def __init__(
        self,
        graph: Graph,
        launcher: Launcher,
        watch: Watch,
        draw: Callable[[], float],
        *,
        siblings: Callable[[str], Sequence[Worker]],
        set_state: Callable[[Worker, WorkerState], None],
        on_ready: Callable[[Worker, EngineFacts], None],
        progress: Progress = silent,
    ) -> None:
        self._graph = graph
        self._launcher = launcher
        self._watch = watch
        self._draw = draw
        self._siblings = siblings
        self._set_state = set_state
        self._on_ready = on_ready
        self._progress = progress
        self._suspects = Suspects()

    async def run(
        self, worker: Worker, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Run one life of a worker after another, until the worker is removed.

        Reports `started` when the first life is ready. Raises WorkerUnfit if the first life does
        not become ready.
        """
        try:
            while worker.is_wanted:
                worker.wake_up = trio.Event()
                await self._run_one_life(worker, task_status)
        finally:
            worker.gone.set()

    async def _run_one_life(self, worker: Worker, task_status: trio.TaskStatus[None]) -> None:
        """Run one life of a worker, and then wait for the pause before its next life."""
        ready_s = await self._run_life(worker, task_status)
        worker.ended = worker.why
        if not worker.is_wanted:
            return
        if worker.is_leaving:
            worker.is_leaving = False
            return
        if not worker.was_ready:  # a graph that cannot start must fail, and not restart for ever
            raise WorkerUnfit(f"engine {worker}: {worker.why}")
        delay_s = self._delay(worker, ready_s)
        _log_death(worker, delay_s)
        with trio.move_on_after(delay_s):
            await worker.wake_up.wait()

    def _delay(self, worker: Worker, ready_s: float | None) -> float:
        """Record a death, and return the pause before the next life, in seconds. A worker whose
        link has failed repeatedly is ejected.
        """
        now, draw = trio.current_time(), self._draw()
        if not worker.is_cut:
            blame = self._blame(worker, was_ready=ready_s is not None)
            delay_s = worker.restarts.died(now, ready_s=ready_s, draw=draw, blame=blame)
            self._set_state(worker, "failing" if worker.restarts.is_failing else "dead")
            return delay_s
        num_ready, ejected = self._count(worker.engine_name)
        # No more workers are ejected than serve: a network fault must not eject all of them.
        may_eject = len(ejected) + 1 <= num_ready
        delay_s = worker.restarts.cut(now, ready_s=ready_s, draw=draw, may_eject=may_eject)
        worker.ejected_s = now
        self._set_state(worker, "ejected" if worker.restarts.is_ejected else "dead")
        return delay_s

    def _blame(self, worker: Worker, *, was_ready: bool) -> Blame:
        """The cause of a death: "request" if one of the worker's requests was in an earlier death,
        too, and otherwise "machine".

        If the worker has emitted no token since a request was last blamed, the worker itself has a
        fault: the cause is then "machine", so that the pauses grow.
        """
        if not was_ready or worker.engine is None:
            return "machine"
        worker.has_served |= worker.engine.has_served
        if not self._suspects.died(worker.engine.unserved) or not worker.has_served:
            return "machine"
        worker.has_served = False
        return "request"

    def limit_ejections(self, engine_name: str) -> None:
        """Restart ejected workers of an engine, longest ejected first, until no more workers are
        ejected than serve.

        Called after each change of a worker's state.
        """
        num_ready, ejected = self._count(engine_name)
        ejected.sort(key=lambda one: one.ejected_s)
        for one in ejected[: max(0, len(ejected) - num_ready)]:
            one.wake_up.set()

    def _count(self, engine_name: str) -> tuple[int, list[Worker]]:
        """The number of serving workers of an engine, and its ejected workers."""
        siblings = self._siblings(engine_name)
        ejected = [one for one in siblings if one.state == "ejected"]
        return sum(one.is_serving for one in siblings), ejected

    async def _run_life(self, worker: Worker, task_status: trio.TaskStatus[None]) -> float | None:
        """Run one life to its end. Returns the time at which it became ready; None: it never was.

        Raises NoResources if the first life cannot be started.
        """
        worker.epoch += 1
        began_s = trio.current_time()
        worker.why, worker.is_cut = "it ended", False
        if worker.is_wanted:
            worker.state = "starting"
        ready_s = None
        try:
            life = self._launcher.launch(worker.epoch)
        except OSError as error:  # no memory, or too many processes
            worker.why = f"it could not be started: {error.strerror}"
            if not worker.was_ready:
                raise NoResources(f"engine {worker}: {worker.why}") from None
            return None
        worker.pid = life.pid
        try:
            async with trio.open_nursery() as nursery:
                worker.life = nursery.cancel_scope
                nursery.start_soon(self._wait_for_end, worker, life, nursery.cancel_scope)
                if await self._open(worker, life.channel):
                    ready_s = trio.current_time()
                    _log_up(worker, ready_s - began_s)
                    assert worker.engine is not None
                    nursery.start_soon(self._ping, worker, life.channel, nursery.cancel_scope)
                    if not worker.was_ready:
                        worker.was_ready = True
                        task_status.started()
                    worker.why, worker.is_cut = await worker.engine.live(life.channel), True
                nursery.cancel_scope.cancel()
        finally:
            worker.life = None
            with trio.CancelScope(shield=True):
                await self._end_life(worker, life)
        return ready_s

    async def _open(self, worker: Worker, channel: Channel) -> bool:
        """Open the worker's engine. Returns whether the engine became ready; if not, `worker.why`
        is the reason.
        """
        opening = Open(
            graph=to_msgpack(self._graph),
            engine=worker.engine_name,
            replica=worker.replica,
            num_blocks=self._num_blocks(worker),
            block_key=hash_secret(),
        )
        channel.put(opening)
        worker.why = f"it was not ready within {self._watch.start_s:g} s"
        with trio.move_on_after(self._watch.start_s):
            try:
                while isinstance(answer := await channel.receive(), Starting):
                    self._report_start(worker, answer.event)
            except ChannelClosed as error:
                worker.why = str(error)
                return False
            if isinstance(answer, Unfit):
                worker.why = answer.error
            if isinstance(answer, Ready):
                worker.why = "it ended"
                self._on_ready(worker, answer.facts)
                return True
        return False

    def _report_start(self, worker: Worker, event: ProgressEvent) -> None:
        # All replicas load the same model: the worker's name tells their progress apart.
        if isinstance(event, Loading):
            event = replace(event, model=f"{event.model} ({worker})")
        self._progress(event)

    def _num_blocks(self, worker: Worker) -> int | None:
        """The number of KV blocks for the worker's engine: that of its earlier lives and of its
        siblings. None: no engine has been opened yet.
        """
        engines = [one.engine for one in self._siblings(worker.engine_name)]
        return next((engine.facts.num_blocks for engine in engines if engine is not None), None)

    async def _wait_for_end(self, worker: Worker, life: Life, scope: trio.CancelScope) -> None:
        code = await life.wait()
        worker.why = f"signal {-code}" if code < 0 else f"exit code {code}"
        worker.is_cut = code == 0  # without a stop message: the worker's link had ended
        if worker.is_cut:
            life.channel.close(worker.why)
        scope.cancel()

    async def _ping(self, worker: Worker, channel: Channel, scope: trio.CancelScope) -> None:
        """Ping the worker. End a life that gives no sign of life, or whose engine hangs."""
        assert worker.engine is not None
        ready_s = since_s = moved_s = trio.current_time()
        while True:
            asked_s = trio.current_time()
            with suppress(ChannelClosed):
                channel.put(Ping())
            await trio.sleep(self._watch.ping_s)
            now = trio.current_time()
            if now - asked_s > self._watch.ping_s + self._watch.silent_s / 2:
                since_s = now  # this process was late itself, and may have missed a sign of life
            silent_s = now - max(channel.last_received_s, since_s)
            if silent_s > self._watch.silent_s:
                worker.why, worker.is_cut = f"no sign of life for {silent_s:.1f} s", True
                scope.cancel()
            worker.restarts.note_uptime(now - ready_s)
            if not worker.engine.health.is_hung:
                moved_s = now
            if now - moved_s > self._watch.hang_s:
                worker.why = "its engine hung"
                scope.cancel()

    async def _end_life(self, worker: Worker, life: Life) -> None:
        """End a life: with a stop message if the worker is healthy, and then by a kill. Close its
        link.
        """
        if worker.why == "it ended":
            with suppress(ChannelClosed):
                life.channel.put(Stop())
            with trio.move_on_after(self._watch.stop_s):
                await life.wait()
        life.kill()
        code = await life.wait()
        # The worker crashed before the kill: its link broke first, as a core dump takes a while.
        if code < 0 and code != -signal.SIGKILL:
            worker.why, worker.is_cut = f"signal {-code}", False
        life.close()
        worker.pid = None


def _log_death(worker: Worker, restart_in_s: float) -> None:
    """Log the death of a worker: as an error if the worker is failing, else as a warning."""
    restarts = worker.restarts
    (log.error if restarts.is_failing else log.warning)(
        "worker_died",
        worker=str(worker),
        why=worker.why,
        restart_in_s=round(restart_in_s, 3),
        num_deaths=sum(restarts.deaths.values()),
        is_failing=restarts.is_failing,
    )


def _log_up(worker: Worker, seconds: float) -> None:
    """Log that a worker is ready, and how long its start took. The first life is logged as
    `worker_up`, and each later life as `worker_replaced`.
    """
    event = "worker_replaced" if worker.was_ready else "worker_up"
    log.info(
        event, worker=str(worker), pid=worker.pid, life=worker.epoch, seconds=round(seconds, 3)
    )
