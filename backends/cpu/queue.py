"""The launch queue of the CPU: launches are computed in order, on one long-lived thread."""

import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from sagellm.backends.cpu.kv_storage import CpuStorage
from sagellm.backends.cpu.program import CpuProgram, NativeProgram
from sagellm.backends.interface import KVStorage, LaunchError, Program
from sagellm.backends.sampler import sample, score
from sagellm.backends.step import Sampled, StepBatch, StepInputs, Ticket
from sagellm.backends.step_inputs import feed, step_inputs

THREAD_NAME = "sagellm-engine"


@dataclass(slots=True, eq=False)
class _Launch:
    program: CpuProgram | NativeProgram
    storage: CpuStorage
    batch: StepBatch
    inputs: StepInputs
    ticket: "Future[Sampled]" = field(default_factory=Future)


class CpuQueue:
    """Implements Queue. Its thread starts at once, and gives torch so many `threads`.

    One thread computes all launches, because OpenMP and the C kernels keep a team of threads for
    each thread that calls them. The caller makes the inputs, while the launch before computes.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._launches: queue.SimpleQueue[_Launch | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(threads,), name=THREAD_NAME)
        self._thread.start()

    def launch(self, program: Program, storage: KVStorage, batch: StepBatch) -> Ticket:
        if not isinstance(program, CpuProgram | NativeProgram):
            raise TypeError(f"the cpu runs programs that it lowered, not {type(program).__name__}")
        if not isinstance(storage, CpuStorage):
            raise TypeError(f"the cpu reads its own pools, not {type(storage).__name__}")
        inputs = step_inputs(batch, storage.layout.block_size)
        launch = _Launch(program, storage, batch, inputs)
        self._launches.put(launch)
        return launch.ticket

    def close(self) -> None:
        self._launches.put(None)
        self._thread.join()

    def _work(self, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        while (launch := self._launches.get()) is not None:
            if not launch.ticket.set_running_or_notify_cancel():
                continue  # cancelled before it began
            try:
                sampled = _computed(launch)
            except BaseException as error:  # the ticket raises it; the thread serves later launches
                launch.ticket.set_exception(error)
            else:
                launch.ticket.set_result(sampled)


@torch.inference_mode()
def _computed(launch: _Launch) -> Sampled:
    batch, inputs = launch.batch, launch.inputs
    if batch.after is not None:
        feed(batch, inputs, _sampled_by(batch.after))
    with launch.program.lock:  # queues of other engines may run the same program
        logits = launch.program.run(inputs, launch.storage.pool)
    num_rows = len(batch.rows)
    sampled = sample(logits[:num_rows], batch.rows)
    if batch.scored:
        sampled.prompt_logprobs.extend(score(logits[num_rows:], batch.scored))
    return sampled


def _sampled_by(ticket: Ticket) -> list[int]:
    """The tokens of the launch before, which has ended. Raises LaunchError if it failed."""
    if ticket.cancelled() or ticket.exception() is not None:
        raise LaunchError("the launch before has failed")
    return ticket.result().token_ids
