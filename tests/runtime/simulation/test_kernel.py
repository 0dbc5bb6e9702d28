"""Simulated tasks wait, are cancelled and time out as those of trio, in an order that is fixed."""

import pytest
import trio

from sagellm.runtime.simulation.kernel import Kernel, SimulationError


def run(*functions):
    """The log of tasks, each a function of (kernel, log)."""
    kernel, log = Kernel(), []
    for function in functions:
        kernel.start_soon(lambda function=function: function(kernel, log))
    kernel.run()
    return log


def test_tasks_sleep_in_simulated_time():
    async def sleeper(kernel, log):
        await kernel.sleep(3600.0)
        log.append(kernel.now)

    assert run(sleeper) == [3600.0]


def test_calls_of_one_time_run_in_order_and_late_calls_after_the_tasks_that_they_wake():
    kernel, log = Kernel(), []
    flag = kernel.flag()

    async def waiter():
        await flag.wait()
        log.append("task")

    kernel.start_soon(waiter)
    kernel.at(1.0, lambda: log.append("late"), is_late=True)
    kernel.at(1.0, flag.set)
    kernel.at(1.0, lambda: log.append("second"))
    kernel.run()
    assert log == ["task", "second", "late"]


def test_a_lot_wakes_tasks_in_the_order_in_which_they_parked():
    kernel, log = Kernel(), []
    lot = kernel.lot()

    async def parker(name):
        await lot.park()
        log.append(name)

    for name in "abc":
        kernel.start_soon(lambda name=name: parker(name))
    kernel.at(1.0, lot.unpark)
    kernel.at(2.0, lot.unpark_all)
    kernel.run()
    assert log == ["a", "b", "c"]
    assert len(lot) == 0


def test_a_cancelled_scope_ends_where_its_task_waits():
    async def cancelled(kernel, log):
        with kernel.scope() as scope:
            kernel.at(1.0, scope.cancel)
            try:
                await kernel.sleep(5.0)
            finally:
                log.append(("cleaned", kernel.now))
        log.append(scope.cancelled_caught)

    assert run(cancelled) == [("cleaned", 1.0), True]


def test_a_scope_that_is_cancelled_while_its_task_runs_ends_at_the_next_wait():
    async def cancelled(kernel, log):
        with kernel.scope() as scope:
            scope.cancel()
            log.append("still runs")
            await kernel.sleep(5.0)
            log.append("never")
        log.append(kernel.now)

    assert run(cancelled) == ["still runs", 0.0]


def test_an_outer_scope_is_not_caught_by_an_inner_scope():
    async def nested(kernel, log):
        with kernel.scope() as outer:
            kernel.at(1.0, outer.cancel)
            with kernel.scope() as inner:
                await kernel.sleep(5.0)
            log.append("never")
        log.append((outer.cancelled_caught, inner.cancelled_caught))

    assert run(nested) == [(True, False)]


def test_a_block_that_takes_too_long_raises_as_with_trio():
    async def slow(kernel, log):
        with pytest.raises(trio.TooSlowError), kernel.fail_after(2.0):
            await kernel.sleep(5.0)
        log.append(kernel.now)
        with kernel.fail_after(2.0):
            await kernel.sleep(1.0)
        log.append(kernel.now)

    assert run(slow) == [2.0, 3.0]


def test_waiting_for_something_else_is_refused():
    class Foreign:
        def __await__(self):
            yield "a socket"

    async def foreign(kernel, log):
        await Foreign()

    with pytest.raises(SimulationError, match="outside of the simulation"):
        run(foreign)
