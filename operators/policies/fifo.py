"""fifo: first come, first served, by arrival in the graph (not by arrival in the queue).

Source: FCFS of queueing theory; the default of vLLM's scheduler (`--scheduling-policy fcfs`).
"""

from sagellm.operators.policies.options import Options
from sagellm.operators.policies.order import Order, Policy
from sagellm.runtime.messages import Request

USES: frozenset[str] = frozenset()


def arrival_s(request: Request) -> float:
    return request.stamps.arrived_s


def policy(options: Options) -> Policy:
    return Policy((Order(arrival_s),))
