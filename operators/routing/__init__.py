"""The strategies of `route`, by name. A new one is a file beside these and a line below."""

from collections.abc import Callable
from typing import TypeAlias

from sagellm.graphs.vocabulary import nearest
from sagellm.operators.routing import affinity, load_balanced, locality, random, round_robin
from sagellm.operators.routing.view import Pool, View
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Draw

Strategy: TypeAlias = Callable[[Request, Pool, View, Draw], int]  # a replica of the pool

STRATEGIES: dict[str, Strategy] = {
    "load_balanced": load_balanced.choose,
    "round_robin": round_robin.choose,
    "random": random.choose,
    "affinity": affinity.choose,
    "locality": locality.choose,
}


def find_strategy(name: str) -> Strategy:
    """The strategy of that name. Raises ValueError."""
    if name not in STRATEGIES:
        close = nearest(name, list(STRATEGIES))
        hint = f"did you mean {close}?" if close else f"known are {', '.join(STRATEGIES)}"
        raise ValueError(f"unknown strategy {name!r}: {hint}")
    return STRATEGIES[name]
