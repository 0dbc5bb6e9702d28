"""admission: the door. Lets a request in while there is room to wait, and refuses it otherwise."""

from dataclasses import dataclass, field

from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.runtime.messages import Request, refusal
from sagellm.runtime.operator import (
    Arrival,
    Draw,
    Emit,
    Feedback,
    Input,
    Output,
    Setup,
    Step,
    Terminate,
)


@dataclass(frozen=True, slots=True)
class Options:
    """`max_queued`: requests that may wait in `policy_sort` before new ones are refused."""

    max_queued: int = field(default=1024, metadata={"min": 1})


SPEC = OpSpec(
    "admission",
    (Port("in", REQUEST),),
    (Port("out", REQUEST),),
    options=Options,
    hears=frozenset({"queue"}),
)


@dataclass(frozen=True, slots=True)
class Admission:
    """Its state is the number of waiting requests, as `policy_sort` last told it.

    Inside one region that number is exact at every arrival: what an input caused, feedback
    included, is over before the executor takes the next input. Where an operator between the two
    can wait (a map with an async function), the requests in that operator are not counted yet;
    its credits bound how many that are. Where nothing downstream tells "queue", nothing waits
    unboundedly either, for the source itself is held back: everything passes.
    """

    name: str
    max_queued: int

    @property
    def initial(self) -> int:
        return 0

    def on(self, state: int, happened: Input, now: float, draw: Draw) -> Step[int]:
        match happened:
            case Feedback(kind="queue", value=int(num_waiting)):
                return Step(num_waiting)
            case Arrival(item=Request() as request):
                return Step(state, (self._judge(state, request, now),))
        return Step(state)

    def _judge(self, num_waiting: int, request: Request, now: float) -> Output:
        if request.expires_s is not None and request.expires_s <= now:
            late = f"{self.name}: it expired before it was admitted: allow it more time"
            return Terminate(refusal(request, "expired", now=now, error=late))
        if num_waiting >= self.max_queued:
            full = (
                f"{self.name}: {num_waiting} requests wait already (max_queued={self.max_queued}): "
                "try again later, or raise max_queued"
            )
            return Terminate(refusal(request, "refused", now=now, error=full))
        return Emit(request)


def build(options: Options, setup: Setup) -> Admission:
    return Admission(setup.name, options.max_queued)
