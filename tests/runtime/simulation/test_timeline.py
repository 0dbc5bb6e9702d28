"""Simulated tasks wait, are cancelled and time out as those of trio, in an order that is fixed."""

import pytest
import trio

from sagellm.runtime.simulation.timeline import SimulationError, Timeline


def run(*functions):
    """The log of tasks, each a function of (timeline, log)."""
    timeline, log = Timeline(), []
    for function in functions:
        timeline.start_soon(lambda function=function: function(timeline, log))
    timeline.run()
    return log


def test_tasks_sleep_in_simulated_time():
    async def sleeper(timeline, log):
        await timeline.sleep(3600.0)
        log.append(timeline.now)

    assert run(sleeper) == [3600.0]


def test_calls_of_one_time_run_in_order_and_late_calls_after_the_tasks_that_they_wake():
    timeline, log = Timeline(), []
    flag = timeline.flag()

    async def waiter():
        await flag.wait()
        log.append("task")

    timeline.start_soon(waiter)
    timeline.at(1.0, lambda: log.append("late"), is_late=True)
    timeline.at(1.0, flag.set)
    timeline.at(1.0, lambda: log.append("second"))
    timeline.run()
    assert log == ["task", "second", "late"]


def test_a_lot_wakes_tasks_in_the_order_in_which_they_parked():
    timeline, log = Timeline(), []
    lot = timeline.lot()

    async def parker(name):
        await lot.park()
        log.append(name)

    for name in "abc":
        timeline.start_soon(lambda name=name: parker(name))
    timeline.at(1.0, lot.unpark)
    timeline.at(2.0, lot.unpark_all)
    timeline.run()
    assert log == ["a", "b", "c"]
    assert len(lot) == 0


def test_a_cancelled_scope_ends_where_its_task_waits():
    async def cancelled(timeline, log):
        with timeline.scope() as scope:
            timeline.at(1.0, scope.cancel)
            try:
                await timeline.sleep(5.0)
            finally:
                log.append(("cleaned", timeline.now))
        log.append(scope.cancelled_caught)

    assert run(cancelled) == [("cleaned", 1.0), True]


def test_a_scope_that_is_cancelled_while_its_task_runs_ends_at_the_next_wait():
    async def cancelled(timeline, log):
        with timeline.scope() as scope:
            scope.cancel()
            log.append("still runs")
            await timeline.sleep(5.0)
            log.append("never")
        log.append(timeline.now)

    assert run(cancelled) == ["still runs", 0.0]


def test_an_outer_scope_is_not_caught_by_an_inner_scope():
    async def nested(timeline, log):
        with timeline.scope() as outer:
            timeline.at(1.0, outer.cancel)
            with timeline.scope() as inner:
                await timeline.sleep(5.0)
            log.append("never")
        log.append((outer.cancelled_caught, inner.cancelled_caught))

    assert run(nested) == [(True, False)]


def test_a_block_that_takes_too_long_raises_as_with_trio():
    async def slow(timeline, log):
        with pytest.raises(trio.TooSlowError), timeline.fail_after(2.0):
            await timeline.sleep(5.0)
        log.append(timeline.now)
        with timeline.fail_after(2.0):
            await timeline.sleep(1.0)
        log.append(timeline.now)

    assert run(slow) == [2.0, 3.0]


def test_waiting_for_something_else_is_refused():
    class Foreign:
        def __await__(self):
            yield "a socket"

    async def foreign(timeline, log):
        await Foreign()

    with pytest.raises(SimulationError, match="outside of the simulation"):
        run(foreign)
