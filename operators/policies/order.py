"""The contract of a policy, which orders waiting requests, and the policies that ship."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from sagellm.runtime.forecast import Forecast
from sagellm.runtime.messages import NORMAL, PRIORITIES, Request

USUAL_SPEED = 1000.0  # prompt tokens a second, assumed until prefills have been measured
GRACE = 0.5  # extra time for a request that missed its objective, as a share of the objective
MIN_WEIGHT = 2.0**-10  # of weighted_shortest_prefill: a budget of 0 must not starve
BEST_EFFORT = sys.float_info.max  # the rank, as a time, of a request without a deadline
_MIN_PREFILL_S = 1e-6  # a prompt that is wholly cached still takes time


@dataclass(frozen=True, slots=True)
class PolicySortOptions:
    """`policy`: a name in the table of `sagellm.operators.policies`, or of a registered policy. The
    policy `own` orders requests by `function`: request -> rank, lowest first, called at arrival.

    `window`: the number of requests at the head of the queue that are offered downstream. If the
    engine of the first request is full, a later request may go to another engine.

    `policy_options`: the options of a policy that is a class.

    All other options belong to the policies whose docstrings name them. `aging_s`: a wait of this
    time, in seconds, outweighs one level of priority. `prefill_tokens_per_s`: the speed at which
    one engine computes prompts; None: it is measured from first tokens, and is USUAL_SPEED until
    enough of them came. `busy_queued`, `overloaded_queued`: the numbers of waiting requests at
    which the system counts as busy and as overloaded. `late`: what becomes of a request that misses
    its deadline anyway. `doubling_s`: after a wait of this time, in seconds, a request counts twice
    as much; 0: waiting does not count.
    """

    policy: str = field(default="fifo", metadata={"names": "policies"})
    window: int = field(default=8, metadata={"min": 1})
    function: str | None = None
    aging_s: float = field(default=10.0, metadata={"min": 0.0})
    prefill_tokens_per_s: float | None = field(default=None, metadata={"min": 1e-3})
    busy_queued: int = field(default=8, metadata={"min": 1})
    overloaded_queued: int = field(default=128, metadata={"min": 2})
    late: Literal["demote", "refuse"] = "demote"
    doubling_s: float = field(default=10.0, metadata={"min": 0.0})
    policy_options: Mapping[str, Any] = field(default_factory=dict)

    def prefill_s(self, request: Request) -> float:
        """T_prefill: the estimated seconds of prefill that the request still needs."""
        return max(request.num_uncached_tokens, 1) / (self.prefill_tokens_per_s or USUAL_SPEED)


@dataclass(frozen=True, slots=True)
class QueueOrder:
    """An order of waiting requests: the lowest rank goes first, and equal ranks go by arrival.

    `rank(request)` must not change while the request waits, because the queue is sorted by
    insertion only. If `grace_s` is given, a rank is a time on the clock: after this time the rank
    becomes `rank + grace_s`, and after the later time it becomes infinite.

    `foreseen(request, prefill_s)`: the rank of a request whose prefill takes `prefill_s` seconds.
    It replaces `rank` as soon as prefill times can be predicted.

    `ahead_s(forecast)`: a rank, as a time, passes this many seconds earlier. `refuses`: a request
    whose rank would become infinite is refused.

    `starts_by_s(request, prefill_s)`: the time after which a request at the head of the queue goes
    behind all others: its rank becomes infinite. For orders whose ranks are no times.
    """

    rank: Callable[[Request], float]
    grace_s: Callable[[Request], float] | None = None
    foreseen: Callable[[Request, float], float] | None = None
    ahead_s: Callable[[Forecast], float] | None = None
    refuses: bool = False
    starts_by_s: Callable[[Request, float], float] | None = None
    prefill_s: Callable[[Request], float] = lambda request: 0.0

    @property
    def lapses(self) -> bool:
        """Whether ranks change after a time, so that requests without an objective go last."""
        return self.grace_s is not None or self.starts_by_s is not None

    @property
    def learns(self) -> bool:
        """Whether the order depends on a forecast."""
        return self.foreseen is not None or self.ahead_s is not None

    def foreseeing(self, prefill_s: Callable[[Request], float]) -> "QueueOrder":
        """The order with `foreseen` as its rank, if it has one, with prefill times by
        `prefill_s(request)`.
        """
        foreseen = self.foreseen
        if foreseen is None:
            return self

        def rank(request: Request) -> float:
            return foreseen(request, prefill_s(request))

        return replace(self, rank=rank, prefill_s=prefill_s)

    def is_late(self, request: Request, until_s: float) -> bool:
        """Whether the time of `starts_by_s` has passed at `until_s`."""
        starts_by_s = self.starts_by_s
        return starts_by_s is not None and starts_by_s(request, self.prefill_s(request)) < until_s

    def later_rank(self, request: Request, now: float) -> float:
        """The rank of a request at time `now`, after its first rank has passed."""
        later_s = self.rank(request) + (self.grace_s(request) if self.grace_s is not None else 0.0)
        return later_s if later_s >= now else math.inf


@dataclass(frozen=True, slots=True)
class Policy:
    """One order for each level of load: the queue uses `orders[level]`.

    The level rises to i + 1 when `rising[i]` requests wait, and falls back to i when fewer than
    half of `rising[i]` wait. This hysteresis prevents a constant load from switching orders.
    """

    orders: tuple[QueueOrder, ...]
    rising: tuple[int, ...] = ()

    def level(self, current: int, num_waiting: int) -> int:
        """The level that follows `current` while `num_waiting` requests wait."""
        while current < len(self.rising) and num_waiting >= self.rising[current]:
            current += 1
        while current > 0 and 2 * num_waiting < self.rising[current - 1]:
            current -= 1
        return current


class RankingPolicy(Protocol):
    """A policy with options or a state: a frozen dataclass. Its fields are the options that
    `policy_options` of `policy_sort` sets. The request with the lowest rank goes first.

    Optional members, with a `QueueEntry` and a `QueueView` of `request_queue.py`:

        reads_cache                      True: engines report their prefix blocks
        taken(state, request, now)       -> state, after a request was sent downstream
        arrived(state, entry, now)       -> state, after a request got its rank
        left(state, entry, now, was_taken)  -> state, after a request was sent, cancelled or expired
        best(state, view, number)        -> (entries, state): what to offer, best first, instead of
                                         the lowest ranks; called after every input
        wake_at(state)                   -> when `best` may change although nothing happens, or None
    """

    @property
    def initial(self) -> Any:
        """The initial state, an immutable value."""

    def rank(
        self, state: Any, request: Request, now: float, forecast: Forecast
    ) -> tuple[float, Any]:
        """The rank of an arriving request, and the next state.

        The method is called once for a request, and the request keeps its rank while it waits: the
        cost does not grow with the length of the queue.
        """


def fifo(options: PolicySortOptions) -> Policy:
    """First come, first served, by the time of arrival in the graph (not in the queue).

    Source: FCFS of queueing theory; the default of vLLM's scheduler (`--scheduling-policy fcfs`).
    """
    return Policy((QueueOrder(arrival_s),))


def arrival_s(request: Request) -> float:
    return request.stamps.arrived_s


def priority(options: PolicySortOptions) -> Policy:
    """By priority (0 critical ... 4 background), then by arrival, with aging.

    rank = arrival + priority * aging_s: with every `aging_s` seconds of waiting, a request gains
    one level over new requests. No request starves: a background request is overtaken only by
    critical requests that arrive within 4 * aging_s after it. Between requests that arrive within
    `aging_s` of each other, priority alone decides. With aging_s = 0 the order is fifo.

    Source: the same linear form as Dynamo's router queue (key = priority_jump - arrival); aging as
    in Silberschatz, Operating System Concepts, chapter on CPU scheduling.
    """

    def aged_s(request: Request) -> float:
        return request.stamps.arrived_s + request.priority * options.aging_s

    return Policy((QueueOrder(aged_s),))


def slo_aware(options: PolicySortOptions) -> Policy:
    """By slack, the least first.

    deadline = arrival + slo_ttft_s, or else expires_s, or else infinity;
    slack = deadline - now - T_prefill, where T_prefill is the prefill time of the uncached tokens:
    predicted from the latest first tokens, or tokens / `prefill_tokens_per_s` if the graph sets
    this option.

    The request with the smallest slack that is not negative goes first. A request with negative
    slack misses its objective anyway, and lets requests pass that can still meet theirs: its
    objective then counts as 1.5 times as long, so that under steady load a slightly late request
    does not become very late. After the longer objective has passed, too, the request goes after
    all requests with an objective. Requests with equal slack go by arrival. `now` is the same for
    all requests, so the order is that of the latest start: deadline - T_prefill.

    Source: least-laxity-first (Mok 1983) with demotion of late jobs.
    """
    return Policy((_by_latest_start(options),))


def _by_latest_start(options: PolicySortOptions) -> QueueOrder:
    def latest_start_s(request: Request) -> float:
        return deadline_s(request) - options.prefill_s(request)

    def foreseen_s(request: Request, prefill_s: float) -> float:
        return deadline_s(request) - prefill_s

    is_given = options.prefill_tokens_per_s is not None
    return QueueOrder(latest_start_s, _grace_s, None if is_given else foreseen_s)


def deadline_s(request: Request) -> float:
    """When the first token is due: the objective, or else the expiry; infinite without either."""
    if request.slo_ttft_s is not None:
        return request.stamps.arrived_s + request.slo_ttft_s
    return math.inf if request.expires_s is None else request.expires_s


def _grace_s(request: Request) -> float:
    return GRACE * (request.slo_ttft_s or 0.0)


def least_slack(options: PolicySortOptions) -> Policy:
    """By slack, the smallest that is not negative first; late requests are demoted or refused.

    slack = deadline - now - T_queue_ahead - T_prefill - T_transfer. The deadline and T_prefill are
    those of slo_aware. T_queue_ahead + T_transfer is the measured mean of all that passes between
    leaving this queue and the first token, without the prefill: the queue of the engine and the
    transfer of KV blocks. Requests of this queue are not ahead of the request with the least slack,
    which is served next; `admission` predicts their time. All slacks fall alike, so the order is
    that of deadline - T_prefill, and takes no sorting.

    A request with negative slack misses its deadline anyway. With `late: demote` it is best effort,
    behind all others, also those without a deadline; with `late: refuse` it ends at once with code
    `slo_unreachable`. Requests without a deadline come after those that can meet theirs, by
    arrival. A request that resumes had its first token, so it has no TTFT objective any more.
    Requests with equal slack go by arrival. Best effort starves under constant overload;
    `expires_s` bounds its wait.

    Source: least-laxity-first (Mok 1983), with the terms of a prefill's slack in disaggregated
    serving (queue, prefill, transfer) as in Mooncake's Algorithm 1 (FAST 2025).
    """

    def latest_start_s(request: Request) -> float:
        return foreseen_s(request, options.prefill_s(request))

    def foreseen_s(request: Request, prefill_s: float) -> float:
        if request.num_emitted or (due_s := deadline_s(request)) == math.inf:
            return BEST_EFFORT
        return due_s - prefill_s

    is_given = options.prefill_tokens_per_s is not None
    order = QueueOrder(
        latest_start_s,
        lambda request: 0.0,
        None if is_given else foreseen_s,
        lambda forecast: forecast.overhead_s or 0.0,
        refuses=options.late == "refuse",
    )
    return Policy((order,))


def weighted_shortest_prefill(options: PolicySortOptions) -> Policy:
    """By weight per second of prefill, the most first, aged.

    weight = 2 ** (normal - priority) * cost_budget: a critical request counts 4, a background one
    1/4, times its budget (1 if it has none; at least MIN_WEIGHT in all). T_prefill is predicted as
    for slo_aware. The value of a request that has waited for `age` seconds is

        weight / T_prefill * 2 ** (age / doubling_s)

    All values double together, so the order of two requests never changes, and is that of the rank
    arrival + doubling_s * log2(T_prefill / weight). A request is overtaken by a request with k
    times its value only if that one arrives within doubling_s * log2(k) after it: none starves.
    With doubling_s = 0 nothing ages, the order is weight / T_prefill alone, and a long prompt may
    starve. Unlike cost_optimized it takes predicted times, priorities and age into account.

    Source: WSPT, W. E. Smith 1956; the exponential age of PREFLOW (vllm-ascend pull request 16360:
    2 ** (age / D) / (P * R), with attention work W(n) = n (n + 1) / 2 for P and R), where the
    measured T_prefill stands for the work.
    """
    doubling_s = options.doubling_s

    def rank(request: Request) -> float:
        return foreseen(request, options.prefill_s(request))

    def foreseen(request: Request, prefill_s: float) -> float:
        relative_s = max(prefill_s, _MIN_PREFILL_S) / _weight(request)
        if not doubling_s:
            return relative_s
        return request.stamps.arrived_s + doubling_s * math.log2(relative_s)

    is_given = options.prefill_tokens_per_s is not None
    return Policy((QueueOrder(rank, foreseen=None if is_given else foreseen),))


def _weight(request: Request) -> float:
    budget = 1.0 if request.cost_budget is None else request.cost_budget
    level = min(max(request.priority, 0), max(PRIORITIES.values()))
    return max(2.0 ** (NORMAL - level) * budget, MIN_WEIGHT)


def cost_optimized(options: PolicySortOptions) -> Policy:
    """By value per second of prefill, the most first.

    WSPT, weighted shortest processing time: descending weight / T_prefill. The weight is the
    request's `cost_budget` (1 if it has none, at least 0); T_prefill is proportional to its
    uncached tokens. On one machine this order minimises the weighted sum of completion times
    (Smith's rule). Requests with a budget of 0 go last. A long prompt with a small budget may wait
    for as long as requests with more value arrive; `expires_s` bounds this wait.

    Source: W. E. Smith, Various optimizers for single-stage production, 1956; Dynamo's `wspt`
    queue.
    """
    return Policy((QueueOrder(_tokens_per_value),))


def _tokens_per_value(request: Request) -> float:
    """The inverse of weight / T_prefill, with T_prefill in tokens."""
    # At least one token, so that the weight also orders prompts that are wholly cached.
    weight = 1.0 if request.cost_budget is None else request.cost_budget
    return max(request.num_uncached_tokens, 1) / weight if weight > 0 else math.inf
