"""One function for each operator of the vocabulary: `ops.policy_sort("slo_aware")`.

Every name that this module defines or imports hides an operator of that name, so it has few.
"""

from collections.abc import Callable
from functools import partial

from sagellm.builder import Operator, operator
from sagellm.extensions import RESOLVER
from sagellm.graphs.vocabulary import nearest


def __getattr__(name: str) -> Callable[..., Operator]:
    if name.startswith("__") or name not in RESOLVER.names:
        close = nearest(name, RESOLVER.names)
        raise AttributeError(f"no operator {name!r}; did you mean {close!r}?")
    return partial(operator, name)


def __dir__() -> list[str]:
    return list(RESOLVER.names)
