"""Circuit breakers open after failures, let one transfer through at a time, and close again."""

from sagellm.runtime.kv.transport import MAX_FAILURES, CircuitBreaker, TransferLink

LINK: TransferLink = (("p", 0), ("d", 1))
OTHER: TransferLink = (("p", 0), ("d", 0))


def failing(took_s: float = 0.5, times: int = MAX_FAILURES) -> CircuitBreaker:
    links = CircuitBreaker()
    for _ in range(times):
        assert links.begin(LINK, 0.0)
        links.failed(LINK, 0.0, took_s=took_s)
    return links


def test_a_link_is_tried_until_it_has_failed_too_often() -> None:
    links = failing(times=MAX_FAILURES - 1)
    assert links.begin(LINK, 0.0)
    links.failed(LINK, 0.0, took_s=0.5)
    assert not links.begin(LINK, 1.9)
    assert links.begin(OTHER, 0.0)


def test_it_is_tried_again_by_one_at_a_time_after_four_times_as_long() -> None:
    links = failing()
    assert links.begin(LINK, 2.0)
    assert not links.begin(LINK, 2.0)
    links.failed(LINK, 6.0, took_s=2.0)
    assert not links.begin(LINK, 13.9)
    assert links.begin(LINK, 14.0)


def test_a_rest_has_bounds() -> None:
    assert not failing(took_s=0.0).begin(LINK, 0.2)
    assert failing(took_s=0.0).begin(LINK, 0.25)
    assert failing(took_s=999.0, times=1).begin(LINK, 30.0)


def test_one_failure_is_enough_where_it_takes_long() -> None:
    assert not failing(took_s=1.0, times=1).begin(LINK, 3.9)


def test_a_transfer_that_passes_forgets_all_failures() -> None:
    links = failing()
    assert links.begin(LINK, 4.0)
    links.passed(LINK)
    assert links.begin(LINK, 4.0)
    assert links.begin(LINK, 4.0)


def test_a_try_that_says_nothing_of_the_link_leaves_it_to_the_next() -> None:
    links = failing()
    assert links.begin(LINK, 4.0)
    links.left(LINK)
    assert links.begin(LINK, 4.0)
