"""What a policy is: one or more orders over waiting requests, and when which of them holds."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from sagellm.runtime.messages import Request


@dataclass(frozen=True, slots=True)
class Order:
    """Lowest rank first, then arrival.

    The rank of a request must not change while it waits: so a queue is sorted once, by insertion.
    What depends on time fits in all the same: where `grace_s` is set, the rank is a clock time. A
    request whose time has passed takes the later one, rank + grace_s, as its rank, and once that
    has passed too it is in no hurry any more: its rank is infinite.
    """

    rank: Callable[[Request], float]
    grace_s: Callable[[Request], float] | None = None

    @property
    def lapses(self) -> bool:
        return self.grace_s is not None

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
