"""HTTP meters, and the lag of a loop."""

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from sagellm.gateway.metrics.meters import EndpointCall, HttpMeters, LoopLag, NoMeters

PATH = "/v1/completions"


@pytest.fixture
def meters() -> HttpMeters:
    return HttpMeters((PATH,))


def test_calls_are_counted_by_endpoint_method_and_status(meters: HttpMeters) -> None:
    meters.request_started(PATH, "POST")
    meters.request_started(PATH, "POST")
    assert meters.num_active == 2
    meters.request_ended(PATH, "POST", 200, 0.2)
    meters.request_ended(PATH, "POST", 429, 0.1)
    call = EndpointCall(PATH, "POST")
    assert meters.num_active == 0
    assert meters.requests == {call: 2}
    assert meters.responses == {(call, 200): 1, (call, 429): 1}
    assert meters.seconds[call].total == pytest.approx(0.3)


def test_what_is_in_no_table_is_unknown(meters: HttpMeters) -> None:
    for number in range(1000):
        meters.request_started(f"/{number}", f"M{number}")
        meters.request_ended(f"/{number}", f"M{number}", 404 if number % 2 else number * 1000, 0)
    call = EndpointCall("unknown", "unknown")
    assert meters.requests == {call: 1000}
    assert set(meters.responses) == {(call, 404), (call, 0)}


def test_clients_that_left_are_counted(meters: HttpMeters) -> None:
    meters.disconnected()
    assert meters.num_disconnects == 1


async def test_no_meters_measure_nothing() -> None:
    meters = NoMeters()
    meters.request_started(PATH, "POST")
    meters.request_ended(PATH, "POST", 200, 1.0)
    meters.disconnected()
    assert (await meters.exposition())[0] == b""


async def test_a_loop_that_is_on_time_has_no_lag(autojump_clock: MockClock) -> None:
    ticks: list[float] = []
    lag = LoopLag(0.5, lambda: ticks.append(trio.current_time()))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lag.run)
        await trio.sleep(5.1)
        nursery.cancel_scope.cancel()
    assert (lag.seconds.num_samples, lag.seconds.total) == (10, pytest.approx(0))
    assert len(ticks) == 10


async def test_a_loop_that_is_held_up_is_late(mock_clock: MockClock) -> None:
    lag = LoopLag(0.5)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lag.run)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(2.5)  # two seconds more than it slept
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert lag.seconds.total == pytest.approx(2.0)
