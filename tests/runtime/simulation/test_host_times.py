"""The time of the host around simulated engines."""

import pytest

from sagellm.runtime.engine.costs.profile import HostCost
from sagellm.runtime.simulation.host_times import HostTimes
from sagellm.runtime.simulation.timeline import Timeline

COST = HostCost(submit_s=1.0, submit_token_s=0.5, deliver_s=2.0, deliver_row_s=0.25)


@pytest.fixture
def called():
    return []


def host(called, cost=COST):
    timeline = Timeline()
    times = HostTimes(timeline, cost)
    return timeline, times, lambda name: lambda: called.append((name, timeline.now))


def test_sequences_enter_one_after_another(called):
    timeline, times, note = host(called)
    times.enter(4, note("a"))
    times.enter(2, note("b"))
    timeline.run()
    assert called == [("a", 3.0), ("b", 5.0)]


def test_events_leave_in_order(called):
    """Those of the second step would be there first: it has fewer sequences."""
    timeline, times, note = host(called)
    times.deliver(8, note("a"))
    timeline.at(1.0, lambda: times.deliver(1, note("b")))
    timeline.at(3.0, lambda: times.deliver(1, note("c")))
    timeline.run()
    assert called == [("a", 4.0), ("b", 4.0), ("c", 5.25)]


def test_nothing_comes_after_a_flush(called):
    timeline, times, note = host(called)
    times.deliver(1, note("a"))
    times.deliver(1, note("b"))
    timeline.at(1.0, times.flush)
    timeline.run()
    assert called == [("a", 1.0), ("b", 1.0)]


def test_without_a_cost_everything_is_done_at_once(called):
    _, times, note = host(called, None)
    times.enter(100, note("a"))
    times.deliver(100, note("b"))
    assert called == [("a", 0.0), ("b", 0.0)]
