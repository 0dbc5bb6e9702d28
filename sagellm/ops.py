"""One function for each operator of the vocabulary: `ops.policy_sort("slo_aware")`.

The module defines and imports little: any other name hides a registered operator of that name.
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
