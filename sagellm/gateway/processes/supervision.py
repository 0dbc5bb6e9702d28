"""The supervisor of the gateway processes of one session: starts, watches and restarts them."""

import random
import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from logging import getLogger
from secrets import token_bytes

import msgspec
import trio

from sagellm.gateway.budgets import SharedCounters
from sagellm.gateway.http.drain import CLOSE_S
from sagellm.gateway.http.routes import PATHS
from sagellm.gateway.metrics.exposition import GatewayMeters
from sagellm.gateway.processes.gateway_process import EXIT_S, GatewayProcess
from sagellm.gateway.processes.link import (
    CancelCall,
    CancelRequest,
    GatewayMessage,
    GatewaySetup,
    QueryAnswer,
    ReadinessChanged,
    Retire,
    RetireRequested,
    Scrape,
    Shutdown,
    StartDrain,
)
from sagellm.gateway.processes.main import GatewayStart, counter_columns
from sagellm.gateway.processes.process_bridge import SummedMeters, counter_report
from sagellm.gateway.protocol.sampling_params import ModelCard
from sagellm.gateway.readiness import Readiness
from sagellm.gateway.settings import BACKLOG, Settings
from sagellm.graphs.log import get_logger
from sagellm.graphs.text.codec import to_msgpack
from sagellm.logs import current_logs
from sagellm.runtime.cluster.child_process import RestartPolicy, Restarts
from sagellm.session import Session

log = get_logger("sagellm.gateway")

POLICY = RestartPolicy(first_s=0.05)  # short, because new connections wait for the restart
FRESH_S = 0.5  # the most time that a scrape waits for new counter reports


class GatewaysFailed(Exception):
    """A gateway process could not be started."""


class GatewaySupervisor:
    """Serves one session with several processes, which accept connections from one socket.

    If a process dies, its requests are cancelled. For the public methods see `GatewayServing`.
    """

    close_s = CLOSE_S + EXIT_S

    def __init__(
        self,
        session: Session,
        settings: Settings,
        models: Sequence[ModelCard],
        meters: GatewayMeters,
        readiness: Readiness,
        sock: socket.socket,
    ) -> None:
        self._session = session
        # All processes must have the same salt key: else they could not share cached prefixes.
        self._settings = replace(settings, salt_key=settings.salt_key or token_bytes(32))
        self._models = tuple(models)
        self._meters = meters
        self._readiness = readiness
        self._sock = sock
        self._num_rows = 2 * settings.num_gateways  # a retiring process and its successor overlap
        self._free_rows = list(range(self._num_rows))
        self._counters = SharedCounters.make(self._num_rows, counter_columns(settings))
        self._processes: list[GatewayProcess] = []
        self._past = SummedMeters(PATHS)  # the counts of processes that have exited
        self._claimed: set[str] = set()  # request ids of all gateways
        self._changed = trio.lowlevel.ParkingLot()
        self._is_started = self._is_draining = self._is_stopping = False
        readiness.on_change = self._send_readiness

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve. Raises GatewaysFailed if a process cannot be started at the beginning."""
        self._sock.listen(BACKLOG)
        with closing(self._counters):
            async with trio.open_nursery() as nursery:
                async with trio.open_nursery() as starting:
                    for number in range(self._settings.num_gateways):
                        starting.start_soon(nursery.start, self._keep, nursery, number)
                self._is_started = True
                task_status.started()

    def drain(self) -> int:
        self._is_draining = True
        self._broadcast(StartDrain())
        return self._counters.count("calls", 0).total

    async def idle(self) -> None:
        while any(process.is_up and not process.is_idle for process in self._processes):
            await self._changed.park()

    def stop(self) -> None:
        self._is_stopping = True
        self._sock.close()
        self._broadcast(Shutdown())
        self._changed.unpark_all()

    # ---- processes ---------------------------------------------------------------------------

    def _broadcast(self, message: msgspec.Struct) -> None:
        """Send a message to all processes."""
        for process in self._processes:
            process.link.put(message)

    def _send_readiness(self) -> None:
        self._broadcast(ReadinessChanged(self._readiness.is_ready, self._readiness.reason))

    async def _keep(
        self,
        nursery: trio.Nursery,
        number: int,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Keep one gateway running: start a new process after each exit or retirement."""
        restarts, was_up = Restarts(POLICY), False
        while not self._is_stopping:
            began_s = trio.current_time()
            process = await self._begin(nursery)
            if process is None:
                return
            while not process.is_over:
                if process.is_up and not was_up:
                    was_up = True
                    log.info("gateway_up", gateway=number)
                    task_status.started()
                await self._changed.park()
            if not process.why:
                log.info("gateway_leaves", gateway=number)  # it retires, and has not exited yet
                continue
            if self._is_stopping:
                return
            if not was_up:
                raise GatewaysFailed(f"a gateway did not start: {process.why}")
            now = trio.current_time()
            delay_s = restarts.died(now, ready_s=began_s, draw=random.random())
            log.warning(
                "gateway_died", gateway=number, why=process.why, restart_in_s=round(delay_s, 3)
            )
            await trio.sleep(delay_s)

    async def _begin(self, nursery: trio.Nursery) -> GatewayProcess | None:
        """Start a process, and run it in a task of `nursery`. Return None if stopping.

        After the beginning, a failed start is repeated until it succeeds.
        """
        while not self._is_stopping:
            if not self._free_rows:
                await self._changed.park()
                continue
            row = self._free_rows.pop(0)
            try:
                process = await GatewayProcess.begin(partial(self._start, row), self._setup)
            except OSError as error:  # no memory, no descriptor, or too many processes
                if not self._is_started:
                    cause = f"a gateway could not be started: {error.strerror}"
                    raise GatewaysFailed(cause) from error
                log.warning("gateway_not_started", error=error.strerror)
                self._free_rows.append(row)
                await trio.sleep(POLICY.longest_s)
            else:
                self._processes.append(process)
                nursery.start_soon(self._run, nursery, process, row)
                return process
        return None

    async def _run(self, nursery: trio.Nursery, process: GatewayProcess, row: int) -> None:
        """Run a process until its exit, then free its row and keep its counts."""
        handle = partial(self._handle, nursery, process)
        streaming, claimed = self._settings.streaming, self._claimed
        try:
            await process.run(self._session, streaming, claimed, handle)
        except Exception as error:  # a bug in this program must not end the other gateways
            process.why = "its link failed"
            log.error("gateway_link_failed", exc_info=error)
        finally:
            self._processes.remove(process)
            self._counters.clear(row)
            self._free_rows.append(row)
            if process.counted is not None:
                self._past.add(process.counted, is_alive=False)
            self._changed.unpark_all()

    def _start(self, row: int, link: int) -> GatewayStart:
        """Return the parameters of a process. `link`: the descriptor of its end of the link."""
        return GatewayStart(
            link, self._sock.fileno(), self._counters.descriptor, self._num_rows, row
        )

    def _setup(self) -> GatewaySetup:
        """Return the first message to a new process, with the current state."""
        return GatewaySetup(
            self._settings,
            self._models,
            to_msgpack(self._session.executor.plan.graph),
            getLogger().level,
            self._readiness.is_ready,
            self._readiness.reason,
            self._is_draining,
            (current_logs() or ("", None))[1],
        )

    # ---- messages of gateways ----------------------------------------------------------------

    def _handle(
        self, nursery: trio.Nursery, process: GatewayProcess, message: GatewayMessage
    ) -> None:
        put = process.link.put
        match message:
            case CancelRequest(number, request_id):
                is_known = process.endpoint is not None and process.endpoint.cancel(request_id)
                put(QueryAnswer(number, is_known=is_known))
            case CancelCall(number, call_id):
                put(QueryAnswer(number, is_known=self._cancel_call(call_id)))
            case Scrape():
                nursery.start_soon(self._answer_scrape, put, message)
            case RetireRequested() if self._is_draining or not self._free_rows:
                # No retirement: it drains with the others, or there is no row for a successor.
                process.is_over = False
            case RetireRequested():
                put(Retire())
        self._changed.unpark_all()

    def _cancel_call(self, call_id: str) -> bool:
        """Cancel a call of any gateway. Return False if no gateway knows it."""
        endpoints = [
            process.endpoint for process in self._processes if process.endpoint is not None
        ]
        return any([endpoint.cancel_call(call_id) for endpoint in endpoints])  # noqa: C419 (all of them)

    async def _answer_scrape(self, put: Callable[[msgspec.Struct], None], asked: Scrape) -> None:
        """Answer a query for the metrics, with the sum over all gateways, past and present."""
        with trio.move_on_after(FRESH_S):
            await self._counted_anew()
        summed = SummedMeters(PATHS)
        summed.add(counter_report(self._past), is_alive=False)
        # This process serves no HTTP, but its dropped log lines count too.
        summed.add(counter_report(self._meters), is_alive=False)
        for process in self._processes:
            if process.counted is not None:
                summed.add(process.counted, is_alive=True)
        try:
            content, content_type = await self._meters.exposition(asked.accept, summed)
        except Exception as error:  # a failed scrape must not end the gateway
            log.error("scrape_failed", exc_info=error)
            put(QueryAnswer(asked.number, is_known=False))
        else:
            put(QueryAnswer(asked.number, True, content, content_type))

    async def _counted_anew(self) -> None:
        """Wait until every living process has sent a new counter report."""
        asked = [(process, process.ask()) for process in self._processes]
        for process, number in asked:
            while process in self._processes and (
                process.counted is None or process.counted.number < number
            ):
                await self._changed.park()
