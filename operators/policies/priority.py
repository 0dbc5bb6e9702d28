"""priority: the more urgent level first (0 critical ... 4 background), then arrival; with aging.

rank = arrival + priority * aging_s: a request gains one level on newcomers in every `aging_s`
seconds that it waits. So none starves: a background request lets pass only those critical ones
that arrive within 4 * aging_s after it. Within `aging_s` of each other, priority alone decides
between requests; with aging_s = 0 this is fifo.

Uses `aging_s`. Source: the same linear form as Dynamo's router queue (key = priority_jump -
arrival); aging as in Silberschatz, Operating System Concepts, chapter on CPU scheduling.
"""

from sagellm.operators.policies.options import Options
from sagellm.operators.policies.order import Order, Policy
from sagellm.runtime.messages import Request

USES = frozenset({"aging_s"})


def policy(options: Options) -> Policy:
    def aged_s(request: Request) -> float:
        return request.stamps.arrived_s + request.priority * options.aging_s

    return Policy((Order(aged_s),))
