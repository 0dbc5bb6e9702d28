"""What a strategy is: it orders the replicas that a request may go to."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, Protocol, TypeAlias, cast

from sagellm.graphs.diagnostics import Diagnostic, GraphError, Path
from sagellm.graphs.facts import Facts
from sagellm.graphs.ir import FrozenMap, freeze
from sagellm.graphs.rules.options import check_options
from sagellm.operators.routing.candidates import Candidates
from sagellm.runtime.operator import Draw
from sagellm.runtime.options import read_options
from sagellm.runtime.registry import check_callable


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

    One that also has `subscribes` needs that feedback: "cache" for `candidates.num_cached_tokens`,
    "first_token" for `candidates.forecast`. None is sent that nobody needs.
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
        return check_callable(name, value)
    missing = [part for part in ("initial", "order") if not hasattr(value, part)]
    if missing:
        raise TypeError(f"strategy {name!r}: class {value.__name__} has no {missing[0]}")
    if not is_dataclass(value):
        raise TypeError(f"strategy {name!r}: class {value.__name__} must be a frozen dataclass")
    return value


def make(found: Registered, name: str, given: Mapping[str, Any], path: Path) -> Function | Strategy:
    """A strategy with its options, which stand at `path` of the graph. Raises GraphError."""
    options = cast(FrozenMap, freeze(dict(given)))
    if not isinstance(found, type):
        if options:
            message = f"strategy `{name}` has no options"
            raise GraphError((Diagnostic("unknown-option", path, message, "leave them out"),))
        return found
    mistakes = tuple(check_options(path, options, found, Facts()))
    if mistakes:
        raise GraphError(mistakes)
    return read_options(found, options)
