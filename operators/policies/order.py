"""What a policy is: one or more orders over waiting requests; and the orders that ship."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sagellm.runtime.forecast import Forecast
from sagellm.runtime.messages import Request

USUAL_SPEED = 1000.0  # tokens of prompts a second, before anything is known


@dataclass(frozen=True, slots=True)
class PolicySortOptions:
    """Which order, and how far past its head to look.

    `policy`: a file of that name beside this one, or one that a user registered; `own` is the order
    of `function`: request -> rank, lowest first, fixed while the request waits. `window`:
    candidates offered, so that a head which finds no credit (its engine is full) does not hold up
    those behind it that could run elsewhere.

    `policy_options`: of a policy that has some of its own.

    The others serve the policies whose docstrings name them. `aging_s`: seconds of waiting that
    outweigh one level of priority. `prefill_tokens_per_s`: how fast one engine computes prompts;
    None: as first tokens show, and 1000 before they do. `busy_queued`, `overloaded_queued`:
    requests waiting from which on the system counts as such.
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
    """Lowest rank first, then arrival.

    The rank of a request must not change while it waits: so a queue is sorted once, by insertion.
    What depends on time fits in all the same: where `grace_s` is set, the rank is a clock time. A
    request whose time has passed takes the later one, rank + grace_s, as its rank, and once that
    has passed too it is in no hurry any more: its rank is infinite.

    `foreseen`: the rank of a request whose prefill takes so many seconds. It counts instead of
    `rank` once prefills can be predicted.
    """

    rank: Callable[[Request], float]
    grace_s: Callable[[Request], float] | None = None
    foreseen: Callable[[Request, float], float] | None = None

    @property
    def lapses(self) -> bool:
        return self.grace_s is not None

    def foreseeing(self, prefill_s: Callable[[Request], float]) -> "QueueOrder":
        """The same, with a prediction of prefills in its ranks."""
        foreseen = self.foreseen
        if foreseen is None:
            return self
        return replace(self, rank=lambda request: foreseen(request, prefill_s(request)))

    def later_rank(self, request: Request, now: float) -> float:
        """Of a request whose rank has passed."""
        later_s = self.rank(request) + (self.grace_s(request) if self.grace_s is not None else 0.0)
        return later_s if later_s >= now else math.inf


@dataclass(frozen=True, slots=True)
class Policy:
    """`orders[level]` holds. The level rises to i + 1 when `rising[i]` requests wait, and falls
    back to i when fewer than half of that do (hysteresis: no change back and forth at one load).
    """

    orders: tuple[QueueOrder, ...]
    rising: tuple[int, ...] = ()

    def level(self, current: int, num_waiting: int) -> int:
        """The level that follows `current`."""
        while current < len(self.rising) and num_waiting >= self.rising[current]:
            current += 1
        while current > 0 and 2 * num_waiting < self.rising[current - 1]:
            current -= 1
        return current


class RankingPolicy(Protocol):
    """A policy with options, or with a state of its own: a frozen dataclass, whose fields are the
    options that `policy_options` of `policy_sort` gives. The lowest rank goes first.

    One that also has `taken(state, request, now) -> state` is told of each request that was sent.
    """

    @property
    def initial(self) -> Any:
        """Its first state, a value."""

    def rank(
        self, state: Any, request: Request, now: float, forecast: Forecast
    ) -> tuple[float, Any]:
        """The rank of a request as it arrives, which it keeps while it waits, and the next state.

        It is asked once a request: what it costs does not grow with those that wait.
        """


FIFO_USES: frozenset[str] = frozenset()


def arrival_s(request: Request) -> float:
    return request.stamps.arrived_s


def fifo(options: PolicySortOptions) -> Policy:
    return Policy((QueueOrder(arrival_s),))


PRIORITY_USES = frozenset({"aging_s"})


def priority(options: PolicySortOptions) -> Policy:
    def aged_s(request: Request) -> float:
        return request.stamps.arrived_s + request.priority * options.aging_s

    return Policy((QueueOrder(aged_s),))


SLO_AWARE_USES = frozenset({"prefill_tokens_per_s"})
GRACE = 0.5  # of its objective, for a request that has missed it


def deadline_s(request: Request) -> float:
    if request.slo_ttft_s is not None:
        return request.stamps.arrived_s + request.slo_ttft_s
    return math.inf if request.expires_s is None else request.expires_s


def grace_s(request: Request) -> float:
    return GRACE * (request.slo_ttft_s or 0.0)


def least_slack(options: PolicySortOptions) -> QueueOrder:
    def latest_start_s(request: Request) -> float:
        return deadline_s(request) - options.prefill_s(request)

    def foreseen_s(request: Request, prefill_s: float) -> float:
        return deadline_s(request) - prefill_s

    is_given = options.prefill_tokens_per_s is not None
    return QueueOrder(latest_start_s, grace_s, None if is_given else foreseen_s)


def slo_aware(options: PolicySortOptions) -> Policy:
    return Policy((least_slack(options),))


COST_OPTIMIZED_USES: frozenset[str] = frozenset()


def tokens_per_value(request: Request) -> float:
    """The inverse of weight / T_prefill, up to the constant speed of prefill."""
    weight = 1.0 if request.cost_budget is None else request.cost_budget
    return max(request.num_uncached_tokens, 1) / weight if weight > 0 else math.inf


def cost_optimized(options: PolicySortOptions) -> Policy:
    return Policy((QueueOrder(tokens_per_value),))


ADAPTIVE_USES = frozenset({"prefill_tokens_per_s", "busy_queued", "overloaded_queued"})
STRETCH = 10.0  # waiting that a request accepts for shorter ones, in its own prefill times


def shortest_first(options: PolicySortOptions) -> QueueOrder:
    def stretched_s(request: Request) -> float:
        return request.stamps.arrived_s + STRETCH * options.prefill_s(request)

    def foreseen_s(request: Request, prefill_s: float) -> float:
        return request.stamps.arrived_s + STRETCH * prefill_s

    is_given = options.prefill_tokens_per_s is not None
    return QueueOrder(stretched_s, foreseen=None if is_given else foreseen_s)


def adaptive(options: PolicySortOptions) -> Policy:
    """Raises ValueError where the thresholds are not in order."""
    if options.busy_queued >= options.overloaded_queued:
        raise ValueError(
            f"busy_queued={options.busy_queued} must be below "
            f"overloaded_queued={options.overloaded_queued}: raise the second"
        )
    orders = (QueueOrder(arrival_s), least_slack(options), shortest_first(options))
    return Policy(orders, (options.busy_queued, options.overloaded_queued))
