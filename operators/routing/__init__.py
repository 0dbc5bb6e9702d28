"""The strategies of `route`, by name, in one table.

A new strategy that ships is a function or a class in `strategies.py` and an entry in the table
below. Users register theirs (`sagellm.register_strategy`), or a package offers them as entry points
`sagellm.strategies`.
"""

from sagellm.operators.routing.strategies import (
    Affinity,
    Locality,
    PrefixAware,
    load_balanced,
    random,
    round_robin,
)
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
        "load_balanced": load_balanced,
        "round_robin": round_robin,
        "random": random,
        "affinity": Affinity,
        "locality": Locality,
        "prefix_aware": PrefixAware,
    },
    check_strategy,
)


def find_strategy(name: str) -> RegisteredStrategy:
    """The strategy of that name. Raises ValueError for an unknown name."""
    return STRATEGIES.find(name)
