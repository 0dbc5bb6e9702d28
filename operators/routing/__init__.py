"""The strategies of `route`, by name. A new one is a file beside these and a line below; those of
users are registered, or offered by packages as entry points `sagellm.strategies`.
"""

from sagellm.operators.routing import load_balanced, random, round_robin
from sagellm.operators.routing.affinity import Affinity
from sagellm.operators.routing.candidates import Candidates
from sagellm.operators.routing.locality import Locality
from sagellm.operators.routing.prefix_aware import PrefixAware
from sagellm.operators.routing.strategy import (
    Function,
    Hold,
    Order,
    Registered,
    Strategy,
    check_strategy,
)
from sagellm.runtime.registry import Registry

__all__ = ["STRATEGIES", "Candidates", "Function", "Hold", "Order", "Strategy", "find_strategy"]

STRATEGIES: Registry[Registered] = Registry(
    "strategy",
    "sagellm.strategies",
    {
        "load_balanced": load_balanced.choose,
        "round_robin": round_robin.choose,
        "random": random.choose,
        "affinity": Affinity,
        "locality": Locality,
        "prefix_aware": PrefixAware,
    },
    check_strategy,
)


def find_strategy(name: str) -> Registered:
    """The strategy of that name. Raises ValueError."""
    return STRATEGIES.find(name)
