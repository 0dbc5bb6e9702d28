"""Running batches one after the other, with the next one launched while one computes."""

from contextlib import suppress

import trio

from sagellm.backends import Sampled
from sagellm.graphs.log import get_logger
from sagellm.runtime.buckets import Buckets
from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.pulse import Pulse
from sagellm.runtime.engine.resources import EngineResources
from sagellm.runtime.engine.runner import Launch
from sagellm.runtime.engine.scheduler import Scheduler
from sagellm.runtime.engine.sequence import UNSTARTED
from sagellm.runtime.messages import Stamps

log = get_logger("sagellm.engine")

STEP_TOKENS = (1, *(8 << power for power in range(12)))  # 8 ... 16384, the buckets of vLLM


class Stepping:
    """The steps of one engine, with async scheduling: as in vLLM, the next step is scheduled and
    launched before the current one has sampled. `name` and `replica` are for the log.
    """

    def __init__(
        self, scheduler: Scheduler, resources: EngineResources, *, name: str, replica: int
    ) -> None:
        self.pulse = Pulse()
        self.num_steps = 0
        self.step_tokens = Buckets(STEP_TOKENS)  # computed in one step
        self._scheduler = scheduler
        self._resources = resources
        self._name = name
        self._replica = replica
        self._launched: Launch | None = None  # computes, or is next to
        self._next: Launch | None = None  # begins when that has sampled

    @property
    def is_computing(self) -> bool:
        return self._launched is not None

    def next_batch(self) -> Batch:
        """The batch that is launched already, or a new one; empty where nothing can advance."""
        return self._launched.batch if self._launched else self._scheduler.schedule()

    async def run(self, batch: Batch) -> Sampled | Exception:
        """Compute and sample; the batch's blocks stay leased until this returns.

        The batch after it is launched meanwhile, and computes when this returns.
        """
        now = trio.current_time()
        for sequence in batch.sequences:
            if sequence.stamps is UNSTARTED:
                sequence.stamps = Stamps(started_s=now)
        self.num_steps += 1
        self.pulse.start(now)
        if self._launched is None:
            batch.begin()
        try:
            return await self._run(batch)
        except Exception as error:
            log.error("step_failed", engine=self._name, replica=self._replica, exc_info=error)
            await self._drop_next()
            return error
        finally:
            batch.end()
            self._launched, self._next = self._next, None
            self.pulse.finish(trio.current_time())

    def recall(self) -> None:
        """Something came that the next batch does not know: schedule anew, if it has not begun."""
        if self._next is not None and self._next.recall():
            self._scheduler.withdraw(self._next.batch)
            self._next = None

    def clear(self) -> None:
        """Nothing computes any more."""
        self._launched = self._next = None

    async def _run(self, batch: Batch) -> Sampled:
        speculation = self._resources.speculation
        if speculation is not None:
            await speculation.extend(batch, self._scheduler)
        self.step_tokens.observe(batch.num_tokens)
        if self._launched is None:
            self._launched = self._resources.runner.launch(batch)
        try:
            self._launch_next(self._launched)
        except Exception:
            await self._launched.result()  # it still writes blocks
            raise
        sampled = await self._launched.result()
        if speculation is not None:
            speculation.observe(batch)
        return sampled

    def _launch_next(self, launched: Launch) -> None:
        if self._resources.schedules_ahead:
            batch = self._scheduler.schedule_ahead()
            if batch.sequences:
                self._next = self._resources.runner.launch(batch, launched)
                batch.begin()

    async def _drop_next(self) -> None:
        """Wait until nothing computes that was launched after a step that failed."""
        self.recall()
        if self._next is not None:
            with suppress(Exception):
                await self._next.result()
            batch, self._next = self._next.batch, None
            self._scheduler.withdraw(batch, has_begun=True)
