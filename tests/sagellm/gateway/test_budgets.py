"""Budgets of tenants, and of retries."""

from contextlib import ExitStack, suppress

import pytest

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.budgets import CANCEL_BURST, Budgets
from sagellm.gateway.settings import Budget, Settings


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def budgets(clock: Clock | None = None, **limits: float) -> Budgets:
    return Budgets(Budget(**limits), clock or Clock())  # type: ignore[arg-type]


def refused(budgets: Budgets, tenant: str = "a") -> ApiError | None:
    try:
        with budgets.hold(tenant):
            return None
    except ApiError as error:
        return error


def test_open_calls_are_bounded_for_each_tenant() -> None:
    some = budgets(num_open=2)
    with some.hold("a"), some.hold("a"):
        error = refused(some)
        assert error is not None
        assert (error.status, error.retry_after_s, error.should_retry) == (429, 1.0, True)
        assert refused(some, "b") is None
    assert refused(some) is None


def test_waiting_ends_with_the_first_token() -> None:
    some = budgets(num_waiting=1)
    with some.hold("a") as hold:
        assert refused(some) is not None
        hold.first_token()
        hold.first_token()
        assert refused(some) is None
        with some.hold("a"):
            assert refused(some) is not None
    assert refused(some) is None


def test_places_end_with_the_requests_and_not_with_the_last_event() -> None:
    """A client that does not read its error event holds no place of its key."""
    some = budgets(num_open=1, num_waiting=1)
    with some.hold("a") as hold:
        with suppress(KeyError), hold.widened(3):
            raise KeyError
        assert refused(some) is None


def cancel(some: Budgets, num: int) -> None:
    for _ in range(num):
        with pytest.raises(KeyboardInterrupt), some.hold("a"):
            raise KeyboardInterrupt  # as every cancellation, no Exception


def test_cancels_are_bounded_over_time() -> None:
    clock = Clock()
    some = budgets(clock, cancels_per_s=4, num_open=4)
    cancel(some, 4)
    error = refused(some)
    assert error is not None
    assert error.retry_after_s == pytest.approx(0.25)
    assert refused(some, "b") is None
    clock.now_s += 0.25
    assert refused(some) is None


def test_an_error_is_no_cancel() -> None:
    some = budgets(cancels_per_s=1, num_open=1)
    for _ in range(5):
        with pytest.raises(LookupError), some.hold("a"):
            raise LookupError
    assert refused(some) is None
    assert some.num_open("a") == 0


def test_retries_are_a_tenth_of_what_was_admitted() -> None:
    """However many calls are refused, no more than that are told to come again."""
    some = budgets()
    while some.may_retry():
        pass
    for _ in range(100):
        with some.hold("a") as hold:
            hold.first_token()
            hold.first_token()
    assert sum(some.may_retry() for _ in range(1000)) == pytest.approx(10, abs=1)


def test_a_full_tenant_spends_the_same_retries() -> None:
    some = budgets(num_open=1)
    with ExitStack() as stack:
        stack.enter_context(some.hold("a"))
        told = [refused(some) for _ in range(50)]
    assert sum(bool(error and error.should_retry) for error in told) == 10


def test_what_is_refused_behind_the_budget_pays_for_no_retry() -> None:
    some = budgets()
    while some.may_retry():
        pass
    for _ in range(100):
        with some.hold("a"):
            pass
    assert not some.may_retry()


@pytest.mark.parametrize("limit", ["num_open", "num_waiting"])
def test_each_request_of_a_call_counts(limit: str) -> None:
    some = budgets(**{limit: 4})
    with some.hold("a", 3):
        with pytest.raises(ApiError), some.hold("a", 2):
            pass
        with some.hold("a", 1):
            assert some.num_open("a") == 4
    assert some.num_open("a") == 0


def test_a_call_larger_than_the_budget_runs_alone() -> None:
    some = budgets(num_open=4, num_waiting=4)
    with some.hold("a", 9):
        assert refused(some) is not None
        assert refused(some, "b") is None
    assert refused(some) is None


def test_nothing_but_the_graph_bounds_what_comes_without_keys() -> None:
    some = Budgets(Settings().common_budget, Clock())
    with ExitStack() as stack:
        for _ in range(2000):
            stack.enter_context(some.hold("anonymous"))
        assert refused(some, "anonymous") is None
    assert some.num_open("anonymous") == 0


def test_a_key_lets_a_thousand_requests_wait_at_once() -> None:
    some = Budgets(Settings(api_keys={"a": "k"}).common_budget, Clock())
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(some.hold("a"))
        assert some.num_open("a") == 1000


def test_a_tenant_may_have_a_budget_of_its_own() -> None:
    settings = Settings(api_keys={"a": "k"}, budget=Budget(num_open=1), budgets={"b": Budget(2)})
    some = Budgets(settings.common_budget, Clock(), own=settings.budgets)
    with some.hold("a"), some.hold("b"), some.hold("b"):
        assert refused(some, "a") is not None
        assert refused(some, "b") is not None
        assert refused(some, "c") is None


def test_a_client_may_break_off_all_that_it_has_at_once() -> None:
    some = budgets(cancels_per_s=4, num_open=40)
    cancel(some, 40)
    assert refused(some) is not None


def test_clients_without_keys_cannot_cancel_so_much_that_others_are_refused() -> None:
    """They share one tenant: a bound for one of them would be a bound for all."""
    some = Budgets(Settings().common_budget, Clock())
    cancel(some, 5000)
    assert refused(some, "a") is None


def test_a_key_whose_open_requests_are_not_bounded_may_cancel_thousands_at_once() -> None:
    some = budgets(num_open=0)
    cancel(some, CANCEL_BURST)
    assert refused(some) is not None


def test_retries_that_were_paid_for_are_kept() -> None:
    """A server that was well for long tells more clients of one wave to come again."""
    some = budgets()
    for _ in range(2000):
        with some.hold("a") as hold:
            hold.first_token()
    assert sum(some.may_retry() for _ in range(1000)) == pytest.approx(210, abs=1)
