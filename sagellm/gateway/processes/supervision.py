"""Gateways in processes of their own before one session: started, watched, started again."""

import random
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from logging import getLogger
from secrets import token_bytes

import msgspec
import structlog
import trio

from sagellm.gateway.count import Tally
from sagellm.gateway.gateway import ModelCard
from sagellm.gateway.metrics.exposition import GatewayMeters
from sagellm.gateway.processes.life import EXIT_S, Life
from sagellm.gateway.processes.messages import (
    Answered,
    Cancel,
    CancelCall,
    Drain,
    FromGateway,
    Readied,
    Scrape,
    Setup,
    Stop,
    Up,
)
from sagellm.gateway.processes.meters import SummedMeters, counted
from sagellm.gateway.processes.start import Start, tally_names
from sagellm.gateway.readiness import Readiness
from sagellm.gateway.routes import PATHS
from sagellm.gateway.server.drain import CLOSE_S
from sagellm.gateway.server.listen import BACKLOG
from sagellm.gateway.settings import Settings
from sagellm.graphs.text.codec import to_msgpack
from sagellm.runtime.cluster.backoff import RestartPolicy, Restarts
from sagellm.session import Session

log = structlog.get_logger("sagellm.gateway")

POLICY = RestartPolicy(first_s=0.05)  # what is accepted meanwhile waits for it
FRESH_S = 0.5  # how long a scrape waits for what the gateways have counted


class GatewaysFailed(Exception):
    """One did not start at all, or every one died too often."""


@dataclass(slots=True, eq=False)
class _Gateway:
    """One of them, through all its lives; `life` is the one that it has now."""

    row: int
    life: Life | None = None
    was_up: bool = False
    has_failed: bool = False
    restarts: Restarts = field(default_factory=lambda: Restarts(POLICY))


class GatewayProcesses:
    """Serves one session by several processes, which take connections from one socket.

    What a process has under way when it dies is cancelled. For the methods see `Serving`.
    """

    close_s = CLOSE_S + EXIT_S

    def __init__(
        self,
        session: Session,
        settings: Settings,
        model: ModelCard,
        meters: GatewayMeters,
        readiness: Readiness,
        sock: socket.socket,
    ) -> None:
        self._session = session
        self._settings = replace(settings, salt_key=settings.salt_key or token_bytes(32))
        self._model = model
        self._meters = meters
        self._readiness = readiness
        self._sock = sock
        self._tally = Tally.make(settings.num_gateways, tally_names(settings))
        self._gateways = [_Gateway(row) for row in range(settings.num_gateways)]
        self._past = SummedMeters(PATHS)  # of lives that are over
        self._changed = trio.lowlevel.ParkingLot()
        self._is_leaving = False  # who ends is not started again
        readiness.on_change = self._tell_readiness

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Raises GatewaysFailed."""
        self._sock.listen(BACKLOG)
        with closing(self._tally):
            async with trio.open_nursery() as nursery:
                async with trio.open_nursery() as starting:
                    for gateway in self._gateways:
                        starting.start_soon(nursery.start, self._keep, nursery, gateway)
                task_status.started()

    def drain(self) -> int:
        self._is_leaving = True
        self._tell(Drain())
        return self._tally.count("calls", 0).total

    async def idle(self) -> None:
        while not all(life.is_idle for life in self._lives):
            await self._changed.park()

    def stop(self) -> None:
        self._is_leaving = True
        self._sock.close()
        self._tell(Stop())

    # ---- lives -------------------------------------------------------------------------------

    @property
    def _lives(self) -> tuple[Life, ...]:
        return tuple(each.life for each in self._gateways if each.life is not None)

    def _tell(self, message: msgspec.Struct) -> None:
        for life in self._lives:
            life.link.put(message)

    def _tell_readiness(self) -> None:
        self._tell(Readied(self._readiness.is_ready, self._readiness.reason))

    async def _keep(
        self,
        nursery: trio.Nursery,
        gateway: _Gateway,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """One life after the other."""

        def up() -> None:
            if not gateway.was_up:
                gateway.was_up = True
                task_status.started()

        while not self._is_leaving:
            began_s = trio.current_time()
            why = await self._live(nursery, gateway, up)
            if self._is_leaving:
                return
            if not gateway.was_up:
                raise GatewaysFailed(f"a gateway did not start: {why}")
            if why == "exit code 0":  # somebody asked it to
                log.info("gateway_left", gateway=gateway.row)
                continue
            now = trio.current_time()
            delay_s = gateway.restarts.died(now, ready_s=began_s, draw=random.random())
            log.warning("gateway_died", gateway=gateway.row, why=why, restart_in_s=delay_s)
            if delay_s is None:
                self._give_up(gateway)
                return
            await trio.sleep(delay_s)

    def _give_up(self, gateway: _Gateway) -> None:
        gateway.has_failed = True
        log.error("gateway_failed", gateway=gateway.row)
        if all(each.has_failed for each in self._gateways):
            raise GatewaysFailed("every gateway died too often; the log says of what")

    async def _live(self, nursery: trio.Nursery, gateway: _Gateway, up: Callable[[], None]) -> str:
        """One life; why it ended."""
        try:
            life = gateway.life = await Life.begin(partial(self._start, gateway.row))
        except OSError as error:  # no memory, or too many processes
            return f"it could not be started: {error.strerror}"

        def hear(message: FromGateway) -> None:
            if isinstance(message, Up):
                up()
            elif isinstance(message, Cancel):
                is_known = life.desk is not None and life.desk.cancel(message.request_id)
                life.link.put(Answered(message.number, is_known=is_known))
            elif isinstance(message, CancelCall):
                is_known = self._cancel_call(message.call_id)
                life.link.put(Answered(message.number, is_known=is_known))
            elif isinstance(message, Scrape):
                nursery.start_soon(self._answer_scrape, life, message)
            self._changed.unpark_all()

        try:
            return await life.run(self._session, self._settings.streaming, self._setup(), hear)
        finally:
            gateway.life = None
            self._tally.clear(gateway.row)
            if life.counted is not None:
                self._past.add(life.counted, is_alive=False)
            self._changed.unpark_all()

    def _start(self, row: int, door: int) -> Start:
        return Start(door, self._sock.fileno(), self._tally.descriptor, len(self._gateways), row)

    def _setup(self) -> Setup:
        return Setup(
            self._settings,
            self._model,
            to_msgpack(self._session.executor.plan.graph),
            getLogger().level,
            self._readiness.is_ready,
            self._readiness.reason,
        )

    # ---- what gateways ask -------------------------------------------------------------------

    def _cancel_call(self, call_id: str) -> bool:
        desks = [life.desk for life in self._lives if life.desk is not None]
        return any([desk.cancel_call(call_id) for desk in desks])  # noqa: C419 (all of them)

    async def _answer_scrape(self, life: Life, asked: Scrape) -> None:
        with trio.move_on_after(FRESH_S):
            await self._counted_anew()
        summed = SummedMeters(PATHS)
        summed.add(counted(self._past), is_alive=False)
        summed.add(counted(self._meters), is_alive=False)  # the lines that this process dropped
        for each in self._lives:
            if each.counted is not None:
                summed.add(each.counted, is_alive=True)
        self._meters.http = summed
        content, content_type = await self._meters.exposition(asked.accept)
        life.link.put(Answered(asked.number, content=content, content_type=content_type))

    async def _counted_anew(self) -> None:
        asked = [(life, life.ask()) for life in self._lives]
        for life, number in asked:
            while life in self._lives and (life.counted is None or life.counted.number < number):
                await self._changed.park()
