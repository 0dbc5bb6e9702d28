"""slo_aware: least slack first.

deadline = arrival + slo_ttft_s, or else expires_s, or else the far future;
slack = deadline - now - T_prefill, where T_prefill is what the prefill of its uncached tokens
takes: as the latest first tokens show, or tokens / prefill_tokens_per_s, where that is given.

The smallest slack that is not negative goes first. A request with negative slack misses its
objective anyway, and gives way to those that need not: its objective counts as 1.5 times as long,
so that under steady load a request that is late by a little is not late by much. Once that has
passed too it is served like one without an objective: after all that have one. Ties are served in
order of arrival. `now` is the same for all, so the order is that of the latest start, deadline -
T_prefill.

Uses `prefill_tokens_per_s`. Source: least-laxity-first (Mok 1983) with demotion of late jobs.
"""

import math

from sagellm.operators.policies.options import Options
from sagellm.operators.policies.order import Order, Policy
from sagellm.runtime.messages import Request

USES = frozenset({"prefill_tokens_per_s"})
GRACE = 0.5  # of its objective, for a request that has missed it


def deadline_s(request: Request) -> float:
    if request.slo_ttft_s is not None:
        return request.stamps.arrived_s + request.slo_ttft_s
    return math.inf if request.expires_s is None else request.expires_s


def grace_s(request: Request) -> float:
    return GRACE * (request.slo_ttft_s or 0.0)


def least_slack(options: Options) -> Order:
    def latest_start_s(request: Request) -> float:
        return deadline_s(request) - options.prefill_s(request)

    def foreseen_s(request: Request, prefill_s: float) -> float:
        return deadline_s(request) - prefill_s

    is_given = options.prefill_tokens_per_s is not None
    return Order(latest_start_s, grace_s, None if is_given else foreseen_s)


def policy(options: Options) -> Policy:
    return Policy((least_slack(options),))
