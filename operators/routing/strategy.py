"""What a strategy is: it orders the replicas that a request may go to."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from sagellm.graphs.diagnostics import Path
from sagellm.operators.routing.candidates import Candidates
from sagellm.runtime.operator import Draw
from sagellm.runtime.options import read_own_options, refuse_options
from sagellm.runtime.registry import check_callable, check_own


@dataclass(frozen=True, slots=True)
class Hold:
    """As the first of an order: a replica that the request waits for although others have room, for
    `limit_s` at most from the first time that it was held back. After that the next ones are tried.
    """

    replica: int
    limit_s: float


# Replicas of the candidates, best first; one alone may be given as it is.
Order: TypeAlias = int | Hold | Iterable[int | Hold]
# The third argument is a random source.
Function: TypeAlias = Callable[[Candidates, float, Draw], Order]


class Strategy(Protocol):
    """A strategy with options, or with a state of its own: a frozen dataclass, whose fields are the
    options that `strategy_options` of `route` gives.

    One that also has `subscribes`, of kinds of feedback, needs "cache" for
    `candidates.num_cached_tokens`, or "first_token" for `prefill_s`, `step_s` and `forecast`. What
    nobody needs is not sent.
    """

    @property
    def initial(self) -> Any:
        """Its first state, a value; each pool of replicas has one."""

    def order(
        self, state: Any, candidates: Candidates, now: float, draw: Draw
    ) -> tuple[Order, Any]:
        """The order for one request, and the state after the request was sent to the first that
        has credit; where none has, the state stays as it is, and the request is ordered again.
        """


Registered: TypeAlias = Function | type[Strategy]


def check_strategy(name: str, value: Any) -> Any:
    """The value itself. Raises TypeError for what is no strategy."""
    if not isinstance(value, type):
        return check_callable(name, value, takes=("candidates", "now", "draw"))
    return check_own(f"strategy {name!r}", value, ("initial", "order"))


def make(found: Registered, name: str, given: Mapping[str, Any], path: Path) -> Function | Strategy:
    """A strategy with its options, which stand at `path` of the graph. Raises GraphError."""
    if isinstance(found, type):
        return read_own_options(found, given, path)
    refuse_options(f"strategy `{name}`", given, path)
    return found
