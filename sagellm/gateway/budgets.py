"""Budgets: what one tenant may have open, counted over all gateway processes."""

import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Protocol

import anyio

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.settings import Budget

_ITEM_BYTES = 8  # written and read in one access of memory


class Counter(Protocol):
    """How much of something there is, here and elsewhere."""

    def add(self, number: int) -> None:
        """Here; it may be negative."""

    @property
    def total(self) -> int: ...


class LocalCounter:
    """There is nobody else."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, number: int) -> None:
        self.total += number


class SharedCounters:
    """A table in memory that processes share: a row a gateway, a column a name.

    No row has two writers, so that there is nothing to lock. A sum may be a moment old.
    """

    def __init__(self, descriptor: int, num_rows: int, names: Sequence[str]) -> None:
        self.descriptor = descriptor
        self._num_rows = num_rows
        self._columns = {name: number for number, name in enumerate(names)}
        self._map = mmap.mmap(descriptor, max(1, num_rows * len(names)) * _ITEM_BYTES)
        self._cells = memoryview(self._map).cast("q")

    @classmethod
    def make(cls, num_rows: int, names: Sequence[str]) -> "SharedCounters":
        """A new table, all zero; its descriptor is for those who share it."""
        descriptor = os.memfd_create("sagellm-tally")
        os.ftruncate(descriptor, max(1, num_rows * len(names)) * _ITEM_BYTES)
        return cls(descriptor, num_rows, names)

    def count(self, name: str, row: int) -> Counter:
        """Of one column, as one row changes it. A name that is not in the table is counted here."""
        column = self._columns.get(name)
        if column is None:
            return LocalCounter()
        return _SharedCounter(self._cells, len(self._columns), column, row)

    def clear(self, row: int) -> None:
        """Whoever wrote that row is no more."""
        width = len(self._columns)
        for cell in range(row * width, (row + 1) * width):
            self._cells[cell] = 0

    def close(self) -> None:
        self._cells.release()
        self._map.close()
        os.close(self.descriptor)


class _SharedCounter:
    def __init__(self, cells: memoryview, width: int, column: int, row: int) -> None:
        self._cells = cells
        self._width = width
        self._column = column
        self._own = row * width + column

    def add(self, number: int) -> None:
        self._cells[self._own] += number

    @property
    def total(self) -> int:
        return sum(self._cells[self._column :: self._width])


RETRY_RATIO = 0.1  # retries that admitted calls pay for: load grows by no more than that
RETRY_BURST = 10.0  # retries that nobody has paid for
MAX_RETRIES = 1000.0  # paid for, and not asked for yet
CANCEL_BURST = 4096  # cancels at once of a tenant whose open requests are not bounded
BUSY_RETRY_S = 1.0


class Bucket:
    """A token bucket: `rate` tokens a second, `burst` at the most. It may go into debt.

    It begins full, or with `level` tokens.
    """

    def __init__(self, burst: float, *, rate: float = 0.0, level: float | None = None) -> None:
        self._burst, self._rate = burst, rate
        self._level, self._at_s = burst if level is None else level, 0.0

    def level(self, now: float) -> float:
        self._level = min(self._burst, self._level + self._rate * max(0.0, now - self._at_s))
        self._at_s = max(self._at_s, now)
        return self._level

    def add(self, tokens: float, now: float) -> None:
        """Negative `tokens` are taken."""
        self._level = min(self._burst, self.level(now) + tokens)


class _Tenant:
    """What one key has under way."""

    def __init__(self, budget: Budget, num_open: Counter, num_waiting: Counter) -> None:
        self.budget = budget
        self.num_open = num_open
        self.num_waiting = num_waiting
        burst = max(budget.cancels_per_s, budget.num_open or CANCEL_BURST)  # all that it has
        self.cancels = Bucket(burst, rate=budget.cancels_per_s)


class Budgets:
    """Tenants are named by keys that the operator gave: there are only so many.

    `count` gives the numbers that all gateways before one graph add up to. What is cancelled, and
    told to try again, each of them counts alone. `budget` is that of a tenant not named in `own`.
    """

    def __init__(
        self,
        budget: Budget,
        now: Callable[[], float] = anyio.current_time,
        count: Callable[[str], Counter] = lambda name: LocalCounter(),
        own: Mapping[str, Budget] = MappingProxyType({}),
    ) -> None:
        self._budget = budget
        self._own = own
        self._now = now
        self._count = count
        self._tenants: dict[str, _Tenant] = {}
        self._retries = Bucket(MAX_RETRIES, level=RETRY_BURST)

    def hold(self, tenant: str, num_requests: int = 1) -> "BudgetHold":
        """Places for the requests of one call, given back at the end of the `with` block.

        Entering raises ApiError 429 where the tenant has too much under way, or has cancelled too
        much of late; a call that is larger than the budget is let in alone. A block that ends by
        cancellation counts as a cancel.
        """
        known = self._tenants.get(tenant)
        if known is None:
            num_open, num_waiting = (self._count(name) for name in counter_names(tenant))
            budget = self._own.get(tenant, self._budget)
            known = self._tenants[tenant] = _Tenant(budget, num_open, num_waiting)
        return BudgetHold(self, known, num_requests)

    def may_retry(self, tenant: str = "") -> bool:
        """Whether one refused call is told to try again: x-should-retry. Spends of the budget."""
        now = self._now()
        if self._retries.level(now) < 1:
            return False
        self._retries.add(-1, now)
        return True

    def num_open(self, tenant: str) -> int:
        known = self._tenants.get(tenant)
        return known.num_open.total if known else 0

    # ---- what holds use ----------------------------------------------------------------------

    def enter(self, tenant: _Tenant, num_requests: int) -> None:
        budget, now = tenant.budget, self._now()
        if _exceeds(tenant.num_open.total, num_requests, budget.num_open):
            raise self._too_much(f"this key may have {budget.num_open} requests under way")
        if _exceeds(tenant.num_waiting.total, num_requests, budget.num_waiting):
            raise self._too_much(f"this key may have {budget.num_waiting} requests waiting")
        debt = -tenant.cancels.level(now)
        if debt >= 0 and budget.cancels_per_s:
            wait_s = (debt + 1) / budget.cancels_per_s
            raise self._too_much("this key cancels too many requests", wait_s)
        tenant.num_open.add(num_requests)
        tenant.num_waiting.add(num_requests)

    def served(self) -> None:
        """A call has its first token, and pays for retries of others."""
        self._retries.add(RETRY_RATIO, self._now())

    def cancelled(self, tenant: _Tenant) -> None:
        tenant.cancels.add(-1, self._now())

    def _too_much(self, message: str, retry_after_s: float = BUSY_RETRY_S) -> ApiError:
        return ApiError(
            429,
            message,
            code="rate_limit_exceeded",
            retry_after_s=retry_after_s,
            should_retry=self.may_retry(),
        )


def _exceeds(num: int, num_more: int, bound: int) -> bool:
    """A call larger than its bound is let in alone."""
    return 0 < bound < num + num_more and num > 0


def counter_names(tenant: str) -> tuple[str, str]:
    """Of its numbers of requests under way, and of those among them without a first token."""
    return f"open {tenant}", f"waiting {tenant}"


class BudgetHold:
    """Places in a tenant's budget."""

    def __init__(self, budgets: Budgets, tenant: _Tenant, num_requests: int) -> None:
        self._budgets, self._tenant = budgets, tenant
        self._num_requests = num_requests
        self._num_waiting = 0

    def first_token(self) -> None:
        """The call waits no longer. May be called more than once."""
        if self._num_waiting:
            self._wait_no_longer()
            self._budgets.served()

    def _wait_no_longer(self) -> None:
        self._tenant.num_waiting.add(-self._num_waiting)
        self._num_waiting = 0

    def __enter__(self) -> "BudgetHold":
        self._budgets.enter(self._tenant, self._num_requests)
        self._num_waiting = self._num_requests
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._wait_no_longer()
        self._tenant.num_open.add(-self._num_requests)
        if kind is not None and not issubclass(kind, Exception):
            self._budgets.cancelled(self._tenant)
