"""What a policy is: one or more orders over waiting requests; and the policies that ship."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sagellm.runtime.forecast import Forecast
from sagellm.runtime.messages import Request

USUAL_SPEED = 1000.0  # prompt tokens a second, assumed until prefills have been measured
GRACE = 0.5  # of its objective: how much later a request that missed it may still start
STRETCH = 10.0  # own prefill times that a request waits for shorter ones


@dataclass(frozen=True, slots=True)
class PolicySortOptions:
    """The options of `policy_sort`: which order, and how far past its head to look.

    `policy`: a name of the table in `sagellm.operators.policies`, or a registered one; `own` is the
    order of `function`: request -> rank, lowest first, fixed while the request waits. `window`:
    candidates offered, so that a head without credit (its engine is full) does not hold up later
    requests that could run elsewhere.

    `policy_options`: the options of a policy that is a class.

    The others serve the policies whose docstrings name them. `aging_s`: seconds of waiting that
    outweigh one level of priority. `prefill_tokens_per_s`: how fast one engine computes prompts;
    None: as first tokens show, and USUAL_SPEED before any came. `busy_queued`,
    `overloaded_queued`: waiting requests from which on the system counts as busy or overloaded.
    """

    policy: str = field(default="fifo", metadata={"names": "policies"})
    window: int = field(default=8, metadata={"min": 1})
    function: str | None = None
    aging_s: float = field(default=10.0, metadata={"min": 0.0})
    prefill_tokens_per_s: float | None = field(default=None, metadata={"min": 1e-3})
    busy_queued: int = field(default=16, metadata={"min": 1})
    overloaded_queued: int = field(default=128, metadata={"min": 2})
    policy_options: Mapping[str, Any] = field(default_factory=dict)

    def prefill_s(self, request: Request) -> float:
        """T_prefill: the estimated seconds of prefill that the request still needs."""
        return max(request.num_uncached_tokens, 1) / (self.prefill_tokens_per_s or USUAL_SPEED)


@dataclass(frozen=True, slots=True)
class QueueOrder:
    """An order over waiting requests: the lowest rank goes first, equal ranks go by arrival.

    The rank of a request must not change while the request waits, so that the queue is sorted once,
    by insertion. A rank that depends on time is expressed by `grace_s`: the rank is then a clock
    time. When that time has passed, the rank becomes `rank + grace_s`; when that has passed too,
    the rank becomes infinite.

    `foreseen`: the rank of a request whose prefill takes so many seconds. It replaces `rank` once
    prefill times can be predicted.
    """

    rank: Callable[[Request], float]
    grace_s: Callable[[Request], float] | None = None
    foreseen: Callable[[Request, float], float] | None = None

    @property
    def lapses(self) -> bool:
        """Whether ranks are clock times that may pass."""
        return self.grace_s is not None

    def foreseeing(self, prefill_s: Callable[[Request], float]) -> "QueueOrder":
        """The same order with ranks that use the prediction `prefill_s`."""
        foreseen = self.foreseen
        if foreseen is None:
            return self
        return replace(self, rank=lambda request: foreseen(request, prefill_s(request)))

    def later_rank(self, request: Request, now: float) -> float:
        """The rank of a request whose first rank has passed."""
        later_s = self.rank(request) + (self.grace_s(request) if self.grace_s is not None else 0.0)
        return later_s if later_s >= now else math.inf


@dataclass(frozen=True, slots=True)
class Policy:
    """One order a level of load; `orders[level]` holds.

    The level rises to i + 1 when `rising[i]` requests wait, and falls back to i when fewer than
    half of `rising[i]` wait. The gap (hysteresis) keeps a constant load from switching orders.
    """

    orders: tuple[QueueOrder, ...]
    rising: tuple[int, ...] = ()

    def level(self, current: int, num_waiting: int) -> int:
        """The level after `current` with so many waiting requests."""
        while current < len(self.rising) and num_waiting >= self.rising[current]:
            current += 1
        while current > 0 and 2 * num_waiting < self.rising[current - 1]:
            current -= 1
        return current


class RankingPolicy(Protocol):
    """A policy with options, or with a state of its own: a frozen dataclass, whose fields are the
    options that `policy_options` of `policy_sort` gives. The lowest rank goes first.

    A policy that also has `taken(state, request, now) -> state` is told of each request that left
    the queue.
    """

    @property
    def initial(self) -> Any:
        """The first state, a value."""

    def rank(
        self, state: Any, request: Request, now: float, forecast: Forecast
    ) -> tuple[float, Any]:
        """The rank of a request as it arrives, and the next state.

        The request keeps the rank while it waits. Called once a request, so that the cost does not
        grow with the length of the queue.
        """


def fifo(options: PolicySortOptions) -> Policy:
    """First come, first served, by arrival in the graph (not by arrival in the queue).

    Source: FCFS of queueing theory; the default of vLLM's scheduler (`--scheduling-policy fcfs`).
    """
    return Policy((QueueOrder(_arrival_s),))


def _arrival_s(request: Request) -> float:
    return request.stamps.arrived_s


def priority(options: PolicySortOptions) -> Policy:
    """The more urgent level first (0 critical ... 4 background), then arrival; with aging.

    rank = arrival + priority * aging_s: a request gains one level on newcomers in every `aging_s`
    seconds that it waits. No request starves: a background request lets pass only those critical
    requests that arrive within 4 * aging_s after it. Between requests that arrive within `aging_s`
    of each other, priority alone decides; with aging_s = 0 the order is fifo.

    Source: the same linear form as Dynamo's router queue (key = priority_jump - arrival); aging as
    in Silberschatz, Operating System Concepts, chapter on CPU scheduling.
    """

    def aged_s(request: Request) -> float:
        return request.stamps.arrived_s + request.priority * options.aging_s

    return Policy((QueueOrder(aged_s),))


def slo_aware(options: PolicySortOptions) -> Policy:
    """Least slack first.

    deadline = arrival + slo_ttft_s, or else expires_s, or else the far future;
    slack = deadline - now - T_prefill, where T_prefill is the time that the prefill of the uncached
    tokens takes: as the latest first tokens show, or tokens / `prefill_tokens_per_s` where the
    graph gives that option.

    The smallest slack that is not negative goes first. A request with negative slack misses its
    objective anyway, and gives way to those that can still meet theirs: its objective counts as 1.5
    times as long, so that under steady load a request that is late by a little is not late by much.
    Once that time has passed too, the request is served like one without an objective: after all
    that have one. Ties are served in order of arrival. `now` is the same for all, so the order is
    that of the latest start, deadline - T_prefill.

    Source: least-laxity-first (Mok 1983) with demotion of late jobs.
    """
    return Policy((_least_slack(options),))


def _least_slack(options: PolicySortOptions) -> QueueOrder:
    def latest_start_s(request: Request) -> float:
        return _deadline_s(request) - options.prefill_s(request)

    def foreseen_s(request: Request, prefill_s: float) -> float:
        return _deadline_s(request) - prefill_s

    is_given = options.prefill_tokens_per_s is not None
    return QueueOrder(latest_start_s, _grace_s, None if is_given else foreseen_s)


def _deadline_s(request: Request) -> float:
    if request.slo_ttft_s is not None:
        return request.stamps.arrived_s + request.slo_ttft_s
    return math.inf if request.expires_s is None else request.expires_s


def _grace_s(request: Request) -> float:
    return GRACE * (request.slo_ttft_s or 0.0)


def cost_optimized(options: PolicySortOptions) -> Policy:
    """Most value for each second of prefill first.

    WSPT, weighted shortest processing time: descending weight / T_prefill, where the weight is the
    request's `cost_budget` (1 if it has none, at least 0) and T_prefill is proportional to its
    uncached tokens. Smith's rule: on one machine this order minimises the weighted sum of
    completion times. Requests with a budget of 0 go last. A long prompt with a small budget may
    wait as long as better ones keep coming; `expires_s` bounds that wait.

    Source: W. E. Smith, Various optimizers for single-stage production, 1956; Dynamo's `wspt`
    queue.
    """
    return Policy((QueueOrder(_tokens_per_value),))


def _tokens_per_value(request: Request) -> float:
    """The inverse of weight / T_prefill, up to the constant speed of prefill."""
    weight = 1.0 if request.cost_budget is None else request.cost_budget
    return max(request.num_uncached_tokens, 1) / weight if weight > 0 else math.inf


def adaptive(options: PolicySortOptions) -> Policy:
    """fifo while calm, slo_aware while busy, shortest first while overloaded.

    The load is the number of waiting requests w, and the level has hysteresis:

        calm        fifo: with few waiting, order changes little, and arrival is the fairest
        busy        slo_aware, from w >= busy_queued until 2 w < busy_queued
        overloaded  shortest prefill first, from w >= overloaded_queued until
                    2 w < overloaded_queued: most objectives are lost by now, and this order serves
                    most requests in a time

    Shortest first is aged: rank = arrival + 10 * T_prefill, so that a request lets pass only
    shorter ones that arrive within ten times its own prefill time. The same inputs give the same
    decisions. Raises ValueError where `busy_queued` is not below `overloaded_queued`.

    Source: the published scheduler's "adaptive" names the idea only; the orders are SPT (Smith
    1956, aged), fifo and slo_aware.
    """
    if options.busy_queued >= options.overloaded_queued:
        raise ValueError(
            f"busy_queued={options.busy_queued} must be below "
            f"overloaded_queued={options.overloaded_queued}: raise the second"
        )
    orders = (QueueOrder(_arrival_s), _least_slack(options), _shortest_first(options))
    return Policy(orders, (options.busy_queued, options.overloaded_queued))


def _shortest_first(options: PolicySortOptions) -> QueueOrder:
    def stretched_s(request: Request) -> float:
        return request.stamps.arrived_s + STRETCH * options.prefill_s(request)

    def foreseen_s(request: Request, prefill_s: float) -> float:
        return request.stamps.arrived_s + STRETCH * prefill_s

    is_given = options.prefill_tokens_per_s is not None
    return QueueOrder(stretched_s, foreseen=None if is_given else foreseen_s)
