"""The budgets of tenants: their open and waiting requests, counted over all gateways."""

import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, TracebackType
from typing import Protocol

import anyio

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.settings import Budget

_ITEM_BYTES = 8  # one cell is read and written in one memory access


class Counter(Protocol):
    """A number that several processes count together."""

    def add(self, number: int) -> None:
        """Add to this process's part; `number` may be negative."""

    @property
    def total(self) -> int: ...


class LocalCounter:
    """A number that one process counts alone."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, number: int) -> None:
        self.total += number


class SharedCounters:
    """A table in memory that processes share: one row a gateway, one column a name.

    Each row has one writer, so nothing is locked. A sum may be a moment old.
    """

    def __init__(self, descriptor: int, num_rows: int, names: Sequence[str]) -> None:
        self.descriptor = descriptor
        self._num_rows = num_rows
        self._columns = {name: number for number, name in enumerate(names)}
        self._map = mmap.mmap(descriptor, max(1, num_rows * len(names)) * _ITEM_BYTES)
        self._cells = memoryview(self._map).cast("q")

    @classmethod
    def make(cls, num_rows: int, names: Sequence[str]) -> "SharedCounters":
        """Return a new table of zeros. Other processes share it by its descriptor."""
        descriptor = os.memfd_create("sagellm-counters")
        os.ftruncate(descriptor, max(1, num_rows * len(names)) * _ITEM_BYTES)
        return cls(descriptor, num_rows, names)

    def count(self, name: str, row: int) -> Counter:
        """Return the counter of a column, for one row. An unknown name is counted locally."""
        column = self._columns.get(name)
        if column is None:
            return LocalCounter()
        return _SharedCounter(self._cells, len(self._columns), column, row)

    def clear(self, row: int) -> None:
        """Set a row to zero after its writer has ended."""
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


RETRY_RATIO = 0.1  # retries that each admitted call pays for: bounds the load of retries
RETRY_BURST = 10.0  # retries allowed at the start
MAX_RETRIES = 1000.0  # the most that may be saved up
CANCEL_BURST = 4096  # cancels at once, where open requests are not bounded
BUSY_RETRY_S = 1.0


class Bucket:
    """A token bucket of `rate` tokens a second and at most `burst` tokens. It may go into debt.

    The bucket begins full, or with `level` tokens.
    """

    def __init__(self, burst: float, *, rate: float = 0.0, level: float | None = None) -> None:
        self._burst, self._rate = burst, rate
        self._level, self._at_s = burst if level is None else level, 0.0

    def level(self, now: float) -> float:
        self._level = min(self._burst, self._level + self._rate * max(0.0, now - self._at_s))
        self._at_s = max(self._at_s, now)
        return self._level

    def add(self, tokens: float, now: float) -> None:
        """Add tokens, or take them if `tokens` is negative."""
        self._level = min(self._burst, self.level(now) + tokens)


class _Tenant:
    """The counters of one tenant."""

    def __init__(self, budget: Budget, num_open: Counter, num_waiting: Counter) -> None:
        self.budget = budget
        self.num_open = num_open
        self.num_waiting = num_waiting
        burst = max(
            budget.cancels_per_s, budget.num_open or CANCEL_BURST
        )  # a client may break off all its requests at once
        self.cancels = Bucket(burst, rate=budget.cancels_per_s)


class Budgets:
    """The budgets of all tenants. The operator names the tenants, so their number is bounded.

    `count` returns the counter of a name, which all gateways of one graph share. Each gateway
    counts cancels and retries alone. A tenant not named in `own` has `budget`.
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
        """Return places for the requests of one call, which the end of the `with` block frees.

        Entering raises ApiError 429 where the tenant has too many open or waiting requests, or has
        recently cancelled too many. A call that is larger than the budget is admitted alone. A
        block that ends by cancellation counts as a cancel.
        """
        known = self._tenants.get(tenant)
        if known is None:
            num_open, num_waiting = (self._count(name) for name in counter_names(tenant))
            budget = self._own.get(tenant, self._budget)
            known = self._tenants[tenant] = _Tenant(budget, num_open, num_waiting)
        return BudgetHold(self, known, num_requests)

    def may_retry(self, tenant: str = "") -> bool:
        """Whether a refused call is told to try again (x-should-retry). Spends a retry."""
        now = self._now()
        if self._retries.level(now) < 1:
            return False
        self._retries.add(-1, now)
        return True

    def num_open(self, tenant: str) -> int:
        known = self._tenants.get(tenant)
        return known.num_open.total if known else 0

    # ---- called by holds ---------------------------------------------------------------------

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
        """Note the first token of a call, which pays for retries of other calls."""
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
    """Whether a bound is exceeded. A call larger than its bound is admitted alone."""
    return 0 < bound < num + num_more and num > 0


def counter_names(tenant: str) -> tuple[str, str]:
    """Return the names of a tenant's counters: open requests, and those without a token."""
    return f"open {tenant}", f"waiting {tenant}"


class BudgetHold:
    """The places of one call in its tenant's budget."""

    def __init__(self, budgets: Budgets, tenant: _Tenant, num_requests: int) -> None:
        self._budgets, self._tenant = budgets, tenant
        self._num_asked = num_requests
        self._num_requests = self._num_waiting = 0
        self._is_cancelled = False

    @contextmanager
    def widened(self, num_requests: int) -> Iterator[None]:
        """Hold one place for each request of the call, while the block lasts.

        Raises ApiError 429 where the tenant has no room for them. A block that ends by
        cancellation counts as a cancel, even if an outer block absorbs the cancellation.
        """
        self._release()
        self._acquire(num_requests)
        try:
            yield
        except BaseException as error:
            self._note(error)
            raise
        finally:  # a last event to a client that does not read needs no place
            self._release()

    def first_token(self) -> None:
        """Note that the call waits no longer. May be called more than once."""
        if self._num_waiting:
            self._wait_no_longer()
            self._budgets.served()

    def _wait_no_longer(self) -> None:
        self._tenant.num_waiting.add(-self._num_waiting)
        self._num_waiting = 0

    def _acquire(self, num_requests: int) -> None:
        self._budgets.enter(self._tenant, num_requests)
        self._num_requests = self._num_waiting = num_requests

    def _release(self) -> None:
        self._wait_no_longer()
        self._tenant.num_open.add(-self._num_requests)
        self._num_requests = 0

    def _note(self, error: BaseException) -> None:
        """Count a cancellation, which is no Exception, once."""
        if not (isinstance(error, Exception) or self._is_cancelled):
            self._is_cancelled = True
            self._budgets.cancelled(self._tenant)

    def __enter__(self) -> "BudgetHold":
        self._acquire(self._num_asked)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()
        if error is not None:
            self._note(error)
