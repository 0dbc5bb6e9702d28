"""The runner that computes with a lowered program, on a thread of its own."""

import threading
from dataclasses import dataclass, field, replace

import torch

from sagellm.backends import Program, StepInputs
from sagellm.runtime.engine.batch import Batch, Scoring
from sagellm.runtime.engine.runner import Drawn
from sagellm.runtime.engine.sampler import draw
from sagellm.runtime.engine.scoring import score
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.engine.worker import Worker


@dataclass(slots=True, eq=False, weakref_slot=True)
class SharedProgram:
    """A program that several engines of a process use in turn: programs are not reentrant."""

    program: Program
    turn: threading.Lock = field(default_factory=threading.Lock)

    def run(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        with self.turn:
            return self.program.run(inputs, pool)


class TorchRunner:
    """Runs forward and sampling on one thread; `threads` is what torch may use below it."""

    def __init__(
        self, program: SharedProgram, pool: torch.Tensor, block_size: int, threads: int | None
    ) -> None:
        self._program = program
        self._pool = pool
        self._block_size = block_size
        self._threads = threads
        self._worker = Worker("sagellm-engine")

    async def open(self) -> None:
        self._worker.start()
        threads = self._threads
        if threads is not None:
            await self._worker.run(lambda: torch.set_num_threads(threads))

    async def close(self) -> None:
        self._worker.stop()

    async def run(self, batch: Batch) -> Drawn:
        return await self._worker.run(lambda: self._compute(batch))

    @torch.inference_mode()
    def _compute(self, batch: Batch) -> Drawn:
        logits = self._program.run(step_inputs(batch, self._block_size), self._pool)
        num_drawing = len(batch.drawing)
        drawn = draw(logits[:num_drawing], batch.drawing)
        return replace(drawn, prompt_logprobs=score(logits[num_drawing:], batch.scoring))


def step_inputs(batch: Batch, block_size: int) -> StepInputs:
    """The ragged tensors of a batch. Rows of logits: those that draw, then those that score."""
    scored = {scoring.sequence: scoring for scoring in batch.scoring}
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, contexts = [0], []
    draw_rows: list[int] = []
    score_rows: list[int] = []
    for sequence, query_len in zip(batch.sequences, batch.query_lens, strict=True):
        start, end = sequence.num_computed, sequence.num_computed + query_len
        token_ids += sequence.tokens[start:end]
        positions += range(start, end)
        slots += _slots(sequence, start, end, block_size)
        starts.append(len(token_ids))
        contexts.append(end)
        if end == len(sequence.tokens):
            draw_rows.append(len(token_ids) - 1)
        if sequence in scored:
            score_rows += _score_rows(scored[sequence], starts[-2])
    return StepInputs(
        token_ids=torch.tensor(token_ids),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        query_starts=torch.tensor(starts),
        context_lens=torch.tensor(contexts),
        block_tables=_block_tables(batch, contexts, block_size),
        logit_rows=torch.tensor(draw_rows + score_rows, dtype=torch.int64),
        query_lens=tuple(batch.query_lens),
        contexts=tuple(contexts),
    )


def _score_rows(scoring: Scoring, start: int) -> range:
    """Of the tokens before those that are scored; the sequence's first row is `start`."""
    first = start - scoring.sequence.num_computed - 1
    return range(first + scoring.positions.start, first + scoring.positions.stop)


def _slots(sequence: Sequence, start: int, end: int, block_size: int) -> list[int]:
    assert sequence.lease is not None
    blocks = sequence.lease.blocks
    return [
        blocks[position // block_size] * block_size + position % block_size
        for position in range(start, end)
    ]


def _block_tables(batch: Batch, contexts: list[int], block_size: int) -> torch.Tensor:
    num_blocks = [-(-context // block_size) for context in contexts]
    width = max(num_blocks)
    rows = []
    for sequence, used in zip(batch.sequences, num_blocks, strict=True):
        assert sequence.lease is not None
        rows.append(sequence.lease.blocks[:used] + [0] * (width - used))
    return torch.tensor(rows, dtype=torch.int32)
