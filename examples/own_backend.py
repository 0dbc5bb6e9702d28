"""A backend of your own: every token is its position in the answer, and nothing is computed."""

from concurrent.futures import Future
from dataclasses import dataclass

from sagellm import Graph, Sampling, ops, register_backend
from sagellm.backends import KVStorage, Program, Sampled, StepBatch, Ticket
from sagellm.backends.null import NullBackend, NullDevice, NullQueue


class CountingQueue(NullQueue):
    def launch(self, program: Program, storage: KVStorage, batch: StepBatch) -> Ticket:
        ticket: Ticket = Future()  # a queue of a real device returns at once, and computes later
        ticket.set_result(Sampled([row.num_output for row in batch.rows]))
        return ticket


class CountingDevice(NullDevice):
    def open_queue(self, threads: int | None = None) -> CountingQueue:
        return CountingQueue()


@dataclass(frozen=True)
class CountingBackend(NullBackend):
    name: str = "counting"

    def device(self, index: int = 0) -> CountingDevice:
        return CountingDevice(self.devices()[index])


BACKEND = CountingBackend()

if __name__ == "__main__":
    register_backend(BACKEND)
    graph = Graph("counting").engine("g", model="sage-tiny", device="counting")
    graph >> ops.generate(engine="g")
    with graph.open() as session:
        answer = session.generate("one", sampling=Sampling(max_tokens=5, ignore_eos=True))
    print("tokens:", answer.token_ids)
