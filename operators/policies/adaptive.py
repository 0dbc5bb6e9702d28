"""adaptive: fifo while calm, slo_aware while busy, shortest first while overloaded.

The load is the number of waiting requests w, and the level has hysteresis:

    calm        fifo: with few waiting, order changes little, and arrival is the fairest
    busy        slo_aware, from w >= busy_queued until 2 w < busy_queued
    overloaded  shortest prefill first, from w >= overloaded_queued until 2 w < overloaded_queued:
                most objectives are lost by now, and this order serves most requests in a time

Shortest first is aged: rank = arrival + 10 * T_prefill, so that a request lets pass only shorter
ones that arrive within ten times its own prefill time. The same inputs give the same decisions.

Uses `prefill_tokens_per_s`, `busy_queued`, `overloaded_queued`. Source: the published scheduler's
"adaptive" names the idea only; the orders are SPT (Smith 1956, aged) and those of the two files.
"""

from sagellm.operators.policies.fifo import arrival_s
from sagellm.operators.policies.options import Options
from sagellm.operators.policies.order import Order, Policy
from sagellm.operators.policies.slo_aware import least_slack
from sagellm.runtime.messages import Request

USES = frozenset({"prefill_tokens_per_s", "busy_queued", "overloaded_queued"})
STRETCH = 10.0  # waiting that a request accepts for shorter ones, in its own prefill times


def shortest_first(options: Options) -> Order:
    def stretched_s(request: Request) -> float:
        return request.stamps.arrived_s + STRETCH * options.prefill_s(request)

    def foreseen_s(request: Request, prefill_s: float) -> float:
        return request.stamps.arrived_s + STRETCH * prefill_s

    is_given = options.prefill_tokens_per_s is not None
    return Order(stretched_s, foreseen=None if is_given else foreseen_s)


def policy(options: Options) -> Policy:
    """Raises ValueError where the thresholds are not in order."""
    if options.busy_queued >= options.overloaded_queued:
        raise ValueError(
            f"busy_queued={options.busy_queued} must be below "
            f"overloaded_queued={options.overloaded_queued}: raise the second"
        )
    orders = (Order(arrival_s), least_slack(options), shortest_first(options))
    return Policy(orders, (options.busy_queued, options.overloaded_queued))
