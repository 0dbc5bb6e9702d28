"""Half a minute of ten times more calls than can be served; afterwards, all is released."""

from collections.abc import Iterator

import pytest
from gateway_overload import (
    CAPACITY,
    COSTS,
    MAX_QUEUED,
    REFUSED_S,
    check_overload,
    options_of,
    overloaded,
    peak_goodput,
)
from gateway_process import ServedProcess, served_process
from gateway_retries import AMPLIFICATION, amplification

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(params=["hypercorn", "uvicorn"])
def server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def served(server: str) -> Iterator[ServedProcess]:
    with served_process(*options_of(COSTS), "--server", server, graph="joint") as found:
        yield found


async def test_goodput_and_promises_hold_at_ten_times_the_load(served: ServedProcess) -> None:
    before = await overloaded(served, 0.5 * CAPACITY, 10.0)
    peak = await peak_goodput(served, 15.0, (0.8, 1.0, 1.2, 1.5))
    load = await overloaded(served, 10 * CAPACITY, 30.0)
    print(load.says)
    check_overload(load, peak)
    assert load.refused_s(0.99) <= REFUSED_S
    after = await overloaded(served, 0.5 * CAPACITY, 10.0)
    print(after.says)
    assert after.summary.errors == {}
    assert after.ttft_p50_s <= 1.5 * before.ttft_p50_s


async def test_the_queue_is_bounded_where_no_objective_bounds_it(server: str) -> None:
    costs = {**COSTS, "admission.slo_ttft_s": 1000.0}
    with served_process(*options_of(costs), "--server", server, graph="joint") as served:
        load = await overloaded(served, 10 * CAPACITY, 10.0)
    print(load.says)
    assert 0.5 * MAX_QUEUED < max(load.depths) <= MAX_QUEUED
    assert load.refused_s(0.99) <= REFUSED_S


def test_a_retrying_client_adds_little(served: ServedProcess) -> None:
    assert amplification(served, 10 * CAPACITY, 20.0) <= AMPLIFICATION
