"""The runner that computes with a lowered program, on a thread of its own."""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from sagellm.backends import Program, StepInputs
from sagellm.backends.layers_done import LayersDone
from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.runner import Drawn
from sagellm.runtime.engine.sampler import draw
from sagellm.runtime.engine.scoring import score
from sagellm.runtime.engine.step_inputs import step_inputs
from sagellm.runtime.engine.worker import Job, Worker

T = TypeVar("T")


@dataclass(slots=True, eq=False, weakref_slot=True)
class SharedProgram:
    """A program that several engines of a process use in turn: programs are not reentrant."""

    program: Program
    turn: threading.Lock = field(default_factory=threading.Lock)

    def run(
        self, inputs: StepInputs, pool: torch.Tensor, layers_done: LayersDone | None = None
    ) -> torch.Tensor:
        with self.turn:
            return self.program.run(inputs, pool, layers_done)


class RecalledError(RuntimeError):
    """A batch that was recalled, or that stands behind one that failed, draws nothing."""


@dataclass(slots=True, eq=False)
class _Queued:
    """A batch on its way; whoever takes the lock of one that is `behind` begins or recalls it."""

    batch: Batch
    job: Job[Drawn]
    claim: threading.Lock


class TorchRunner:
    """Runs forward and sampling on one thread; `threads` is what torch may use below it.

    A batch is queued with its inputs made: between two programs the thread only draws.
    """

    def __init__(
        self, program: SharedProgram, pool: torch.Tensor, block_size: int, threads: int | None
    ) -> None:
        self._program = program
        self._pool = pool
        self._block_size = block_size
        self._threads = threads
        self._worker = Worker("sagellm-engine")
        self._queued: deque[_Queued] = deque()
        self._drawn: Drawn | None = None  # by the newest batch that has run; None: it failed

    async def open(self) -> None:
        self._worker.start()
        threads = self._threads
        if threads is not None:
            await self._worker.run(lambda: torch.set_num_threads(threads))

    async def close(self) -> None:
        self.recall()
        for queued in self._queued:
            with suppress(Exception):
                await queued.job.outcome()
        self._queued.clear()
        self._worker.stop()

    async def run(self, batch: Batch) -> Drawn:
        if not self._queued:
            self.queue(batch)
        queued = self._queued.popleft()
        assert queued.batch is batch
        return await queued.job.outcome()

    async def on_thread(self, compute: Callable[[], T]) -> T:
        """Something else on the same thread, between two batches."""
        return await self._worker.run(compute)

    def queue(self, batch: Batch) -> None:
        claim = threading.Lock()
        if batch.is_behind:
            inputs = step_inputs(batch, self._block_size)
            job = self._worker.put(lambda: self._follow(batch, inputs, claim))
        else:
            job = self._worker.put(lambda: self._begin(batch))
        self._queued.append(_Queued(batch, job, claim))

    def recall(self) -> bool:
        if not self._queued or not self._queued[-1].batch.is_behind:
            return False
        if not self._queued[-1].claim.acquire(blocking=False):
            return False
        self._queued.pop()
        return True

    def _begin(self, batch: Batch) -> Drawn:
        self._drawn = None
        return self._compute(batch, step_inputs(batch, self._block_size))

    def _follow(self, batch: Batch, inputs: StepInputs, claim: threading.Lock) -> Drawn:
        drawn = self._drawn
        if not claim.acquire(blocking=False) or drawn is None:
            raise RecalledError
        self._drawn = None
        inputs.token_ids.numpy()[:] = batch.feed(drawn.token_ids)
        return self._compute(batch, inputs)

    @torch.inference_mode()
    def _compute(self, batch: Batch, inputs: StepInputs) -> Drawn:
        logits = self._program.run(inputs, self._pool, batch.layers_done)
        rows = batch.rows
        drawn = draw(logits[: len(rows)], rows)
        scores = score(logits[len(rows) :], batch.scoring) if batch.scoring else []
        self._drawn = replace(drawn, prompt_logprobs=scores)
        return self._drawn
