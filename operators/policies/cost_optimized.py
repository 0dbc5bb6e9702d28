"""cost_optimized: most value for each second of prefill first.

WSPT, weighted shortest processing time: descending weight / T_prefill, where the weight is the
request's `cost_budget` (1 if it has none, at least 0) and T_prefill is proportional to its uncached
tokens. Smith's rule: on one machine this order minimises the weighted sum of completion times.
Requests with a budget of 0 go last. A long prompt with a small budget may wait as long as better
ones keep coming; give it an `expires_s` to bound that.

Source: W. E. Smith, Various optimizers for single-stage production, 1956; Dynamo's `wspt` queue.
"""

import math

from sagellm.operators.policies.options import Options
from sagellm.operators.policies.order import Order, Policy
from sagellm.runtime.messages import Request

USES: frozenset[str] = frozenset()


def tokens_per_value(request: Request) -> float:
    """The inverse of weight / T_prefill, up to the constant speed of prefill."""
    weight = 1.0 if request.cost_budget is None else request.cost_budget
    return max(request.num_uncached_tokens, 1) / weight if weight > 0 else math.inf


def policy(options: Options) -> Policy:
    return Policy((Order(tokens_per_value),))
