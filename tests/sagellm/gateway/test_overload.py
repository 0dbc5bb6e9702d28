"""Ten times more calls than can be served, over HTTP: seconds of what `make soak` does for long."""

from collections.abc import Iterator

import pytest
from gateway_overload import (
    CAPACITY,
    COSTS,
    LATE_S,
    REFUSED_S,
    check_overload,
    options_of,
    overloaded,
    peak_goodput,
)
from gateway_process import ServedProcess, served_process
from gateway_retries import AMPLIFICATION, amplification

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def served() -> Iterator[ServedProcess]:
    with served_process(*options_of(COSTS), graph="joint") as found:
        yield found


@pytest.mark.soak
async def test_goodput_and_promises_hold_at_ten_times_the_load(served: ServedProcess) -> None:
    await overloaded(served, 3 * CAPACITY, 1.0)  # a graph that has served before: there is evidence
    peak = await peak_goodput(served, 3.0, (1.0,))
    load = await overloaded(served, 10 * CAPACITY, 4.0)
    print(load.says)
    if load.late_s > LATE_S:
        pytest.skip(f"this machine is too busy to tell: {load.says}")
    check_overload(load, peak)
    # The bar is one for p99, on a machine that does nothing else: `make soak`.
    assert load.refused_s(0.5) <= REFUSED_S


def test_a_retrying_client_adds_little(served: ServedProcess) -> None:
    assert amplification(served, 10 * CAPACITY, 3.0) <= AMPLIFICATION
