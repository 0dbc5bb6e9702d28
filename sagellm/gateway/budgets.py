"""The budgets of tenants: bounds on open and waiting requests, over all gateways of a graph."""

import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, TracebackType
from typing import Protocol

import anyio

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.settings import Budget

_ITEM_BYTES = 8  # an aligned cell of 8 bytes is read and written in one memory access


class Counter(Protocol):
    """A count that may be the sum over several processes."""

    def add(self, number: int) -> None:
        """Add to this process's part of the count; `number` may be negative."""

    @property
    def total(self) -> int:
        """The sum over all processes."""
        ...


class LocalCounter:
    """A count of one process only."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, number: int) -> None:
        self.total += number


class SharedCounters:
    """A table of counts in shared memory: one row for each gateway, one column for each name.

    Only one process writes a row, so there are no locks. A total may be slightly out of date.
    """

    def __init__(self, descriptor: int, num_rows: int, names: Sequence[str]) -> None:
        self.descriptor = descriptor
        self._num_rows = num_rows
        self._columns = {name: number for number, name in enumerate(names)}
        self._map = mmap.mmap(descriptor, max(1, num_rows * len(names)) * _ITEM_BYTES)
        self._cells = memoryview(self._map).cast("q")

    @classmethod
    def make(cls, num_rows: int, names: Sequence[str]) -> "SharedCounters":
        """Return a new table of zeros. Other processes map it from its file descriptor."""
        descriptor = os.memfd_create("sagellm-counters")
        os.ftruncate(descriptor, max(1, num_rows * len(names)) * _ITEM_BYTES)
        return cls(descriptor, num_rows, names)

    def count(self, name: str, row: int) -> Counter:
        """Return the counter of a column, which adds to `row`. An unknown name counts locally."""
        column = self._columns.get(name)
        if column is None:
            return LocalCounter()
        return _SharedCounter(self._cells, len(self._columns), column, row)

    def clear(self, row: int) -> None:
        """Set a row to zero. The process that wrote the row must have ended."""
        width = len(self._columns)
        for cell in range(row * width, (row + 1) * width):
            self._cells[cell] = 0

    def close(self) -> None:
        """Free the table in this process. Its counters must not be used any more."""
        self._cells.release()
        self._map.close()
        os.close(self.descriptor)


class _SharedCounter:
    """The counter of one column. It writes its own row, and sums all rows."""

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


RETRY_RATIO = 0.1  # retries earned by each admitted call: retries add about 10 % load at most
RETRY_BURST = 10.0  # retries allowed at the start
MAX_RETRIES = 1000.0  # the most retries that a gateway saves up
CANCEL_BURST = 4096  # cancels allowed at once, if the budget does not bound open requests
BUSY_RETRY_S = 1.0


class Bucket:
    """A token bucket: it gains `rate` tokens a second, up to `burst` tokens.

    The bucket starts full, or with `level` tokens. Its level may become negative.
    """

    def __init__(self, burst: float, *, rate: float = 0.0, level: float | None = None) -> None:
        self._burst, self._rate = burst, rate
        self._level, self._at_s = burst if level is None else level, 0.0

    def level(self, now: float) -> float:
        """Refill the bucket up to the time `now`, and return its tokens."""
        self._level = min(self._burst, self._level + self._rate * max(0.0, now - self._at_s))
        self._at_s = max(self._at_s, now)
        return self._level

    def add(self, tokens: float, now: float) -> None:
        """Add tokens; a negative number removes tokens."""
        self._level = min(self._burst, self.level(now) + tokens)


class _Tenant:
    """The counters of one tenant."""

    def __init__(self, budget: Budget, num_open: Counter, num_waiting: Counter) -> None:
        self.budget = budget
        self.num_open = num_open
        self.num_waiting = num_waiting
        # A client may disconnect all its requests at once, for example when it is stopped.
        burst = max(budget.cancels_per_s, budget.num_open or CANCEL_BURST)
        self.cancels = Bucket(burst, rate=budget.cancels_per_s)


class Budgets:
    """The budgets of all tenants. The settings name the tenants, so their number is bounded.

    `count` returns the counter with a name; all gateways of one graph share the counters. Cancels
    and retries are counted for each gateway separately. `own` maps a tenant to its own budget; any
    other tenant has `budget`.
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
        """Return a context manager that counts the requests of one call in the tenant's budget.

        Entering raises ApiError 429 if the tenant has too many open or waiting requests, or has
        recently cancelled too many requests. A call that is larger than the budget is admitted if
        the tenant has no open request. If the block is cancelled, that counts as a cancel.
        """
        known = self._tenants.get(tenant)
        if known is None:
            num_open, num_waiting = (self._count(name) for name in counter_names(tenant))
            budget = self._own.get(tenant, self._budget)
            known = self._tenants[tenant] = _Tenant(budget, num_open, num_waiting)
        return BudgetHold(self, known, num_requests)

    def may_retry(self, tenant: str = "") -> bool:
        """Spend a retry, and return True; return False if none is left.

        The result is the x-should-retry header of a refused call.
        """
        now = self._now()
        if self._retries.level(now) < 1:
            return False
        self._retries.add(-1, now)
        return True

    def num_open(self, tenant: str) -> int:
        """The open requests of a tenant, in all gateways."""
        known = self._tenants.get(tenant)
        return known.num_open.total if known else 0

    # ---- called by holds ---------------------------------------------------------------------

    def enter(self, tenant: _Tenant, num_requests: int) -> None:
        """Count `num_requests` requests as open and waiting. Raises ApiError 429."""
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
        """Record that a call got its first token. Each such call earns a part of a retry."""
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
    """Whether `num` + `num_more` exceed `bound`; 0 is no bound.

    False if `num` is 0: a call that is larger than the bound is admitted alone.
    """
    return 0 < bound < num + num_more and num > 0


def counter_names(tenant: str) -> tuple[str, str]:
    """Return the names of a tenant's counters: open requests, and requests without a token."""
    return f"open {tenant}", f"waiting {tenant}"


class BudgetHold:
    """The requests of one call, counted in its tenant's budget until the `with` block ends."""

    def __init__(self, budgets: Budgets, tenant: _Tenant, num_requests: int) -> None:
        self._budgets, self._tenant = budgets, tenant
        self._num_asked = num_requests
        self._num_requests = self._num_waiting = 0
        self._is_cancelled = False

    @contextmanager
    def widened(self, num_requests: int) -> Iterator[None]:
        """Count `num_requests` requests for the call, instead of the number given to `hold`.

        The end of the block uncounts them. Raises ApiError 429 if the budget has no room for them.
        If the block is cancelled, that counts as a cancel, even if an outer block absorbs the
        cancellation.
        """
        self._release()
        self._acquire(num_requests)
        try:
            yield
        except BaseException as error:
            self._note(error)
            raise
        finally:  # the requests have ended, even if a slow client still reads the last event
            self._release()

    def first_token(self) -> None:
        """Record the call's first token: its requests wait no longer. Later calls do nothing."""
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
        """Count a cancel if `error` is a cancellation; at most once for each call."""
        # Cancellations of trio and asyncio are BaseExceptions, not Exceptions.
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
