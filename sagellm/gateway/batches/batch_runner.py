"""Works through the open batches of a data folder, fairly between tenants, until cancelled."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import anyio
import anyio.abc

from sagellm.gateway.batches.batch_store import BatchClaim, Stores
from sagellm.gateway.batches.batch_work import BatchWork, RequestServer
from sagellm.gateway.metrics.meters import BatchMeters
from sagellm.graphs.log import get_logger

LOG = get_logger("sagellm.gateway")

SCAN_S = 2.0  # interval of looks for batches that other processes made, or left when they died
FAULT_S = 30.0  # pause after a fault, such as a full disk, before the batch is tried again
SWEEP_S = 3600.0


class Turns:
    """Bounds the requests that run at once, and shares them equally between tenants.

    The semaphores serve waiting tasks in order. A tenant has at most `limit` requests in the order
    of all tenants, however many batches it has.
    """

    def __init__(self, limit: int) -> None:
        self._all = anyio.Semaphore(limit)
        self._own: defaultdict[str, anyio.Semaphore] = defaultdict(lambda: anyio.Semaphore(limit))

    async def take(self, tenant: str) -> AbstractContextManager[None]:
        """Wait for a turn. Leaving the returned context ends it."""
        own = self._own[tenant]
        await own.acquire()
        try:
            await self._all.acquire()
        except BaseException:
            own.release()
            raise
        return self._turn(own)

    @contextmanager
    def _turn(self, own: anyio.Semaphore) -> Iterator[None]:
        try:
            yield
        finally:
            self._all.release()
            own.release()


class BatchRunner:
    """Claims open batches, and works on each in a task. Used on the app's loop.

    Each batch is worked on by one process only. If that process ends, another one claims it.
    `tenants`: the tenants whose batches are worked on.
    """

    def __init__(
        self,
        stores: Stores,
        server: RequestServer,
        meters: BatchMeters,
        tenants: Collection[str],
    ) -> None:
        self._stores = stores
        self._folder = stores.folder
        self._server = server
        self._meters = meters
        self._tenants = tuple(tenants)
        self._woken: anyio.Event | None = None  # made on the loop that `run` runs on
        self._fault: str | None = None  # of the last look for batches; logged when it changes

    def wake(self) -> None:
        """Look for new batches at once."""
        if self._woken is not None:
            self._woken.set()

    async def run(self) -> None:
        """Work through batches until cancelled. During a drain no batch is claimed."""
        turns = Turns(self._folder.limits.num_batch_calls)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._sweep)
            while True:
                self._woken = anyio.Event()
                if not self._server.is_draining:
                    await self._claim(tasks, turns)
                with anyio.move_on_after(SCAN_S):
                    await self._woken.wait()

    async def _claim(self, tasks: anyio.abc.TaskGroup, turns: Turns) -> None:
        try:
            claims = await self._folder.run(lambda: [*self._stores.batches.claims(self._tenants)])
        except OSError as error:
            if error.strerror != self._fault:
                self._fault = error.strerror
                LOG.warning("batches_unreadable", error=error.strerror)
            return
        self._fault = None
        for claim in claims:
            tasks.start_soon(self._work, claim, turns)

    async def _work(self, claim: BatchClaim, turns: Turns) -> None:
        """Work on one batch. A fault ends neither the server nor other batches."""
        with claim, self._meters.working():
            work = BatchWork(
                claim,
                self._folder,
                self._server,
                self._meters,
                partial(turns.take, claim.record.tenant),
                self._folder.limits.num_batch_calls,
            )
            try:
                await work.run()
            except* Exception as group:
                LOG.error("batch_interrupted", batch=claim.record.id, exc_info=group)
            else:
                return
            await anyio.sleep(FAULT_S)

    async def _sweep(self) -> None:
        """Delete every `SWEEP_S` seconds what has expired."""
        while True:
            try:
                await self._folder.run(self._stores.files.sweep)
                await self._folder.run(self._stores.batches.sweep)
            except OSError as error:
                LOG.warning("files_not_swept", error=error.strerror)
            await anyio.sleep(SWEEP_S)
