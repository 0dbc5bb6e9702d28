"""A strategy of your own: a burst of requests to one replica, then a burst to the next."""

from dataclasses import dataclass, field

from sagellm import Graph, Request, Sampling, ops, register_strategy
from sagellm.operators.routing import Candidates
from sagellm.runtime.operator import Draw


@dataclass(frozen=True)
class InBursts:
    """Its fields are options of the graph. Its state is the number of requests sent so far."""

    length: int = field(default=2, metadata={"min": 1})
    initial = 0

    def order(self, sent: int, candidates: Candidates, now: float, draw: Draw) -> tuple[int, int]:
        numbers = candidates.numbers  # replicas that are up, with room if any has room
        return numbers[sent // self.length % len(numbers)], sent + 1


replicas = []


def note(request: Request) -> Request:
    replicas.append(request.placement["generate"])
    return request


if __name__ == "__main__":
    register_strategy("in_bursts", InBursts)
    graph = Graph("bursts").engine("g", model="null", device="null", replicas=2)
    route = ops.route("in_bursts", strategy_options={"length": 3})
    graph >> route >> ops.map(note) >> ops.generate(engine="g")
    with graph.open() as session:
        for _ in range(6):
            session.generate([1], sampling=Sampling(max_tokens=1))
    print("replicas:", replicas)
