"""The policy adaptive: an order for each level of load, by the number of waiting requests."""

import math

from sagellm.operators.policies.order import (
    BEST_EFFORT,
    Policy,
    PolicySortOptions,
    QueueOrder,
    arrival_s,
    deadline_s,
    least_slack,
)
from sagellm.runtime.messages import Request

STRETCH = 10.0  # a request waits for shorter requests for this multiple of its own prefill time
_PATIENT_S = 1e9  # added to ranks of requests without an objective; above any prefill time


def adaptive(options: PolicySortOptions) -> Policy:
    """least_slack while calm, then the shortest prefill that is still in time.

    The level depends on the number w of waiting requests, with hysteresis:

        calm        least_slack: all objectives can be met, and this order meets them
        busy        shortest in time, from w >= busy_queued until 2 w < busy_queued: not all
                    objectives can be met, and this order meets the most
        overloaded  shortest in time, from w >= overloaded_queued until 2 w < overloaded_queued;
                    requests without an objective are then ordered by length, too

    Shortest in time: requests with an objective go by T_prefill, the least first. A request that
    could not start in time any more (after deadline - T_prefill, as of slo_aware) goes behind all
    others. Requests without a deadline go after those that have
    one: by arrival, and while overloaded by the rank arrival + 10 * T_prefill, so that each is
    overtaken only by shorter ones that arrive within ten times its own prefill time. A request
    that resumes has no objective any more.

    Under constant overload long prompts miss their objectives, and late requests starve;
    `expires_s` bounds their wait. The same inputs give the same decisions. Raises ValueError if
    `busy_queued` is not below `overloaded_queued`.

    Source: the published scheduler's "adaptive" names the idea only. Shortest first meets the most
    deadlines of an overloaded machine among orders that do not plan ahead: it is the rule by which
    Moore's algorithm (1968) drops jobs. SPT: Smith 1956, here aged.
    """
    if options.busy_queued >= options.overloaded_queued:
        raise ValueError(
            f"busy_queued={options.busy_queued} must be below "
            f"overloaded_queued={options.overloaded_queued}: raise the second"
        )
    orders = (
        *least_slack(options).orders,
        _shortest_in_time(options, by_length=False),
        _shortest_in_time(options, by_length=True),
    )
    return Policy(orders, (options.busy_queued, options.overloaded_queued))


def _shortest_in_time(options: PolicySortOptions, *, by_length: bool) -> QueueOrder:
    """The order of the levels above calm. `by_length`: of requests without an objective, too."""

    def rank(request: Request) -> float:
        return foreseen(request, options.prefill_s(request))

    def foreseen(request: Request, prefill_s: float) -> float:
        if not _is_patient(request):
            return prefill_s
        return _PATIENT_S + arrival_s(request) + STRETCH * prefill_s if by_length else BEST_EFFORT

    def starts_by_s(request: Request, prefill_s: float) -> float:
        return math.inf if _is_patient(request) else deadline_s(request) - prefill_s

    is_given = options.prefill_tokens_per_s is not None
    return QueueOrder(
        rank,
        foreseen=None if is_given else foreseen,
        starts_by_s=starts_by_s,
        prefill_s=options.prefill_s,
    )


def _is_patient(request: Request) -> bool:
    """Whether a request has no deadline for its first token, or has had this token."""
    return bool(request.num_emitted) or deadline_s(request) == math.inf
