"""What a policy is: one or more orders over waiting requests, and when which of them holds."""

from collections.abc import Callable
from dataclasses import dataclass

from sagellm.runtime.messages import Request


@dataclass(frozen=True, slots=True)
class Order:
    """Lowest rank first, then arrival.

    The rank of a request must not change while it waits: so a queue is sorted once, by insertion.
    What depends on time fits in all the same: where `lapses` is set, the rank is a clock time,
    and requests whose time has passed go behind all others.
    """

    rank: Callable[[Request], float]
    lapses: bool = False


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
