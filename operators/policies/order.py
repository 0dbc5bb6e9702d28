"""What a policy is: one or more orders over waiting requests, and when which of them holds."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sagellm.runtime.forecast import Forecast
from sagellm.runtime.messages import Request


@dataclass(frozen=True, slots=True)
class Order:
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

    def foreseeing(self, prefill_s: Callable[[Request], float]) -> "Order":
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

    orders: tuple[Order, ...]
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
