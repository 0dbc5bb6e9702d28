"""The table of the strategies of `route`, by name.

To ship a strategy, add a function or a class to a file here, and an entry to the table below.
Users register their own strategies with `sagellm.register_strategy`; packages offer strategies as
entry points `sagellm.strategies`.
"""

from sagellm.operators.routing.prefix_aware import PrefixAware
from sagellm.operators.routing.scored import LeastConnections, LeastResponseTime, PredictedLatency
from sagellm.operators.routing.strategies import (
    Affinity,
    Locality,
    TopologyAware,
    WeightedRoundRobin,
    load_balanced,
    power_of_two,
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
        "power_of_two": power_of_two,
        "least_connections": LeastConnections,
        "least_response_time": LeastResponseTime,
        "weighted_round_robin": WeightedRoundRobin,
        "topology_aware": TopologyAware,
        "predicted_latency": PredictedLatency,
    },
    check_strategy,
)


def find_strategy(name: str) -> RegisteredStrategy:
    """The strategy `name`. Raises ValueError for an unknown name."""
    return STRATEGIES.find(name)
