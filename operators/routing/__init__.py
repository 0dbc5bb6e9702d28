"""The strategies of `route`, by name. A new one is a file beside these and a line below; those of
users are registered, or offered by packages as entry points `sagellm.strategies`.
"""

from collections.abc import Callable, Iterable
from typing import TypeAlias

from sagellm.operators.routing import affinity, load_balanced, locality, random, round_robin
from sagellm.operators.routing.view import Candidates
from sagellm.runtime.operator import Draw
from sagellm.runtime.registry import Registry, check_callable

# A replica of the candidates, or several, best first. The third argument is a random source.
Strategy: TypeAlias = Callable[[Candidates, float, Draw], int | Iterable[int]]

STRATEGIES: Registry[Strategy] = Registry(
    "strategy",
    "sagellm.strategies",
    {
        "load_balanced": load_balanced.choose,
        "round_robin": round_robin.choose,
        "random": random.choose,
        "affinity": affinity.choose,
        "locality": locality.choose,
    },
    check_callable,
)


def find_strategy(name: str) -> Strategy:
    """The strategy of that name. Raises ValueError."""
    return STRATEGIES.find(name)
