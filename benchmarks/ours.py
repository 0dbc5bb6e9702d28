"""sagellm's engine in the smallest graph that contains an engine."""

import time
from pathlib import Path

from benchmarks.cells import Cell, Run
from benchmarks.shape import QWEN05
from sagellm import Graph, Sampling, ops
from sagellm.opening.bridge import BlockingSession

# Enough for one sequence of full length. Blocks take memory only when they are written.
NUM_BLOCKS = QWEN05.max_len // 16


def bench_graph(model: Path, threads: int) -> Graph:
    """The graph source -> generate -> sink."""
    graph = Graph("bench")
    graph.engine(
        "g",
        model=str(model),
        threads=threads,
        num_blocks=NUM_BLOCKS,
        prefix_caching=False,  # a repeated cell would find its own prompts in the cache
    )
    return graph >> ops.generate(engine="g")


class Ours:
    """Runs a cell in an open session."""

    name = "sagellm"

    def __init__(self, session: BlockingSession, vocab_size: int = QWEN05.vocab_size) -> None:
        self._session = session
        self._vocab_size = vocab_size

    def run(self, cell: Cell, number: int) -> Run:
        sampling = Sampling(max_tokens=cell.num_out, ignore_eos=True)
        started = time.perf_counter()
        streams = [
            self._session.stream(prompt, sampling=sampling)
            for prompt in cell.prompts(number, self._vocab_size)
        ]
        num_tokens, firsts = 0, []
        for stream in streams:
            for event in stream:
                firsts.append(time.perf_counter())
                num_tokens += len(event.token_ids)
        total_s = time.perf_counter() - started
        if num_tokens != cell.num_sequences * cell.num_out:
            raise RuntimeError(f"{cell.name}: {num_tokens} tokens came out")
        return Run(firsts[0] - started, total_s, cell.num_out)
