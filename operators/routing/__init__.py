"""The strategies of `route`, by name. A new one is a file beside these and a line below; those of
users are registered, or offered by packages as entry points `sagellm.strategies`.
"""

from sagellm.operators.routing import strategies
from sagellm.operators.routing.strategies import Affinity, Locality, PrefixAware
from sagellm.operators.routing.strategy import (
    Candidates,
    Hold,
    Order,
    RegisteredStrategy,
    Strategy,
    StrategyFunction,
    check_strategy,
)
from sagellm.runtime.registry import Registry

__all__ = [
    "STRATEGIES",
    "Candidates",
    "Hold",
    "Order",
    "Strategy",
    "StrategyFunction",
    "find_strategy",
]

STRATEGIES: Registry[RegisteredStrategy] = Registry(
    "strategy",
    "sagellm.strategies",
    {
        "load_balanced": strategies.load_balanced,
        "round_robin": strategies.round_robin,
        "random": strategies.random,
        "affinity": Affinity,
        "locality": Locality,
        "prefix_aware": PrefixAware,
    },
    check_strategy,
)


def find_strategy(name: str) -> RegisteredStrategy:
    """The strategy of that name. Raises ValueError."""
    return STRATEGIES.find(name)
