"""Running batches one behind the other, the next one queued while one computes."""

from contextlib import suppress

import trio

from sagellm.graphs.log import get_logger
from sagellm.runtime.buckets import Buckets
from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.collecting import Collector
from sagellm.runtime.engine.equipment import Equipment
from sagellm.runtime.engine.following import follow
from sagellm.runtime.engine.layer_watch import LayerWatch
from sagellm.runtime.engine.pulse import Pulse
from sagellm.runtime.engine.runner import Drawn, Lookahead
from sagellm.runtime.engine.scheduler import Scheduler
from sagellm.runtime.engine.sequence import UNSTARTED
from sagellm.runtime.messages import Stamps

log = get_logger("sagellm.engine")

STEP_TOKENS = (1, *(8 << power for power in range(12)))  # 8 ... 16384, the buckets of vLLM


class Stepping:
    """The steps of one engine. `name` and `replica` are what its faults are logged under."""

    def __init__(
        self, scheduler: Scheduler, collector: Collector, *, name: str, replica: int
    ) -> None:
        self.pulse = Pulse()
        self.num_steps = 0
        self.step_tokens = Buckets(STEP_TOKENS)  # computed in one step
        self._scheduler = scheduler
        self._collector = collector
        self._name = name
        self._replica = replica
        self._lookahead: Lookahead | None = None
        self.layer_watch: LayerWatch | None = None
        self._ahead: Batch | None = None  # begins when what computes now has drawn

    def next(self) -> Batch:
        """The batch that computes already, or a new one; empty where nothing can advance."""
        return self._collector.launched or self._scheduler.schedule()

    async def run(self, batch: Batch, equipment: Equipment) -> Drawn | Exception:
        """Compute and draw; the batch's blocks stay leased until this returns.

        The step behind it is queued, and computes when this returns, unless it was recalled.
        """
        now = trio.current_time()
        for sequence in batch.sequences:
            if sequence.stamps is UNSTARTED:
                sequence.stamps = Stamps(started_s=now)
        self._collector.launched = batch
        self.num_steps += 1
        self.pulse.start(now)
        try:
            return await self._run(batch, equipment)
        except Exception as error:
            log.error("step_failed", engine=self._name, replica=self._replica, exc_info=error)
            await self._drop_ahead(equipment)
            return error
        finally:
            self._collector.launched, self._ahead = self._ahead, None
            if self.layer_watch is not None:
                self.layer_watch.end()
            self.pulse.finish(trio.current_time())

    def recall(self) -> None:
        """Something came that the step ahead does not know: schedule anew, if it has not begun."""
        if self._lookahead and self._ahead and self._lookahead.recall():
            self._ahead = None

    async def _run(self, batch: Batch, equipment: Equipment) -> Drawn:
        speculation = equipment.speculation
        if speculation is not None:
            await speculation.extend(batch, self._scheduler)
        self.step_tokens.observe(batch.num_tokens)
        if self.layer_watch is not None:
            self.layer_watch.begin(batch)
        self._look_ahead(batch, equipment.lookahead)
        drawn = await equipment.runner.run(batch)
        if speculation is not None:
            speculation.observe(batch)
        return drawn

    def _look_ahead(self, batch: Batch, lookahead: Lookahead | None) -> None:
        """Begin `batch`, and queue the one behind it where who computes then is known already."""
        self._lookahead = lookahead
        if lookahead is None:
            return
        if not batch.is_behind:
            lookahead.queue(batch)
        self._ahead = follow(batch, self._scheduler)
        if self._ahead is not None:
            lookahead.queue(self._ahead)

    async def _drop_ahead(self, equipment: Equipment) -> None:
        """Wait for the step behind one that failed: it fails as well, at once."""
        self.recall()
        if self._ahead is not None:
            with suppress(Exception):
                await equipment.runner.run(self._ahead)
            self._ahead = None
