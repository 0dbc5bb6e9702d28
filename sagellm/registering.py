"""How a user's own functions, operators, policies, strategies and kinds of engines get the names
that graphs use.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

from sagellm.graphs.vocabulary import OpSpec
from sagellm.operators.policies import OWN, POLICIES, policy_module
from sagellm.operators.policies.options import Options
from sagellm.operators.policies.order import Policy, RankingPolicy
from sagellm.operators.routing import STRATEGIES
from sagellm.operators.routing.strategy import Registered, check_strategy
from sagellm.runtime.engine.kinds import KINDS
from sagellm.runtime.engine.kinds.kind import EngineKind, read_kind
from sagellm.runtime.operator import Build
from sagellm.runtime.registry import FUNCTIONS, check_callable
from sagellm.runtime.resolver import Resolver

RESOLVER = Resolver()
F = TypeVar("F", bound=Callable[..., Any])


def register_operator(spec: OpSpec, build: Build) -> None:
    """Make `op: NAME` and `ops.NAME(...)` mean this operator. Raises ValueError where the name is
    taken, TypeError for what is no operator.
    """
    RESOLVER.register(spec, build)


def register_function(function: Callable[..., Any], name: str | None = None) -> None:
    """Make `function: NAME` of a graph mean this function; its own name unless one is given.

    Raises ValueError where the name is taken or is none, TypeError for what cannot be called.
    """
    known = name if name is not None else getattr(function, "__name__", "")
    FUNCTIONS.register(known, check_callable(known, function))


@overload
def function(given: F) -> F: ...


@overload
def function(given: str) -> Callable[[F], F]: ...


def function(given: Any) -> Any:
    """A decorator: `@sagellm.function`, or `@sagellm.function("another_name")`."""
    if isinstance(given, str):
        return lambda decorated: _registered(decorated, given)
    return _registered(given, None)


def _registered(decorated: F, name: str | None) -> F:
    register_function(decorated, name)
    return decorated


def register_policy(
    name: str,
    policy: Callable[[Options], Policy] | type[RankingPolicy],
    *,
    uses: Iterable[str] = (),
) -> None:
    """Make `policy: NAME` of `policy_sort` mean this policy; a frozen dataclass has options and a
    state: see `sagellm.operators.policies.order.RankingPolicy`.

    `uses`: the options of `policy_sort` that it reads; a graph that sets another is refused.
    Raises ValueError where the name is taken, TypeError for what is no policy.
    """
    if name == OWN:
        raise ValueError(f"policy {OWN!r} is the order of `function`; choose another name")
    POLICIES.register(name, policy_module(name, policy, uses))


def register_strategy(name: str, strategy: Registered) -> None:
    """Make `strategy: NAME` of `route` mean this function, (candidates, now, draw) -> a replica or
    several, best first; or this frozen dataclass, which has options and a state: see
    `sagellm.operators.routing.Strategy`.

    Raises ValueError where the name is taken, TypeError for what is no strategy.
    """
    STRATEGIES.register(name, check_strategy(name, strategy))


def register_engine_kind(name: str, kind: EngineKind) -> None:
    """Make `kind: NAME` of an engine mean this kind.

    Raises ValueError where the name is taken, TypeError for what is no kind.
    """
    KINDS.register(name, read_kind(name, kind))
