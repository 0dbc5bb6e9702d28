"""slo_aware: least slack first.

deadline = arrival + slo_ttft_s, or else expires_s, or else the far future;
slack = deadline - now - T_prefill, where T_prefill = uncached tokens / prefill_tokens_per_s.

The smallest slack that is not negative goes first. A request with negative slack misses its
objective anyway, and goes behind all others, so that it makes no other one miss. Ties, requests
without an objective among them, are served in order of arrival. `now` is the same for all, so the
order is that of the latest start, deadline - T_prefill, with those that have passed put last.

Uses `prefill_tokens_per_s`. Source: least-laxity-first (Mok 1983) with demotion of late jobs.
"""

import math

from sagellm.operators.policies.options import Options
from sagellm.operators.policies.order import Order, Policy
from sagellm.runtime.messages import Request

USES = frozenset({"prefill_tokens_per_s"})


def deadline_s(request: Request) -> float:
    if request.slo_ttft_s is not None:
        return request.stamps.arrived_s + request.slo_ttft_s
    return math.inf if request.expires_s is None else request.expires_s


def least_slack(options: Options) -> Order:
    def latest_start_s(request: Request) -> float:
        return deadline_s(request) - options.prefill_s(request)

    return Order(latest_start_s, lapses=True)


def policy(options: Options) -> Policy:
    return Policy((least_slack(options),))
