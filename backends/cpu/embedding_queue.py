"""The queue of the CPU for programs that embed: one thread computes all launches."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sagellm.backends.arrays import Floats
from sagellm.backends.cpu.native.tuning import default_threads
from sagellm.backends.cpu.program import THREAD_NAME, StepProgram
from sagellm.backends.interface import Program
from sagellm.backends.step import StepInputs
from sagellm.backends.text_batches import NO_KV, TextBatch, VectorsTicket, batch_inputs

_NO_POOL = np.empty(NO_KV.pool_shape(0), dtype=np.float32)


class CpuEmbeddingQueue:
    """An EmbeddingQueue. `threads`: how many threads kernels may use; None: `default_threads`.

    One thread computes all launches, because OpenMP keeps a team of threads for each calling
    thread.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or default_threads(None)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=THREAD_NAME)

    def embed(self, program: Program, batch: TextBatch) -> VectorsTicket:
        if not isinstance(program, StepProgram):
            raise TypeError(f"the cpu runs programs that it lowered, not {type(program).__name__}")
        return self._worker.submit(self._run, program, batch_inputs(batch))

    def close(self) -> None:
        self._worker.shutdown()

    def _run(self, program: StepProgram, inputs: StepInputs) -> Floats:
        with program.lock:  # queues of other engines may run the same program
            return program.run(inputs, _NO_POOL, self._threads)
