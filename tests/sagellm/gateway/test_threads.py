"""Hung work keeps its place: threads stay bounded whoever gives up on them, on either loop."""

import gc
import threading
import time
import weakref
from functools import partial

import anyio
import pytest

from sagellm.gateway.threads import Overrun, WorkerThreads


@pytest.fixture
def gate():
    """Work waits for it; open when the test ends, so that no thread outlives it."""
    event = threading.Event()
    yield event
    event.set()


class _Prompt:
    """Something whose end can be seen."""


def _wait(gate: threading.Event, prompt: _Prompt) -> None:
    gate.wait(20)


async def given_up(threads: WorkerThreads, gate: threading.Event) -> None:
    with anyio.move_on_after(0.02):
        await threads.run(gate.wait)


def test_abandoned_work_keeps_its_place_until_it_ends(run, gate):
    async def check() -> tuple[bool, str]:
        threads = WorkerThreads(1)
        await given_up(threads, gate)
        with anyio.move_on_after(0.05) as wait:
            await threads.run(lambda: "too early")
        gate.set()
        with anyio.fail_after(20):
            return wait.cancelled_caught, await threads.run(lambda: "after it")

    assert run(check) == (True, "after it")


def test_one_that_waits_goes_on_when_the_abandoned_work_ends(run, gate):
    async def check() -> str:
        threads = WorkerThreads(1)
        await given_up(threads, gate)
        opener = threading.Timer(0.05, gate.set)
        opener.start()
        with anyio.fail_after(20):
            return await threads.run(lambda: "let in")

    assert run(check) == "let in"


def test_nothing_stays_of_abandoned_work_that_has_ended(run):
    """Each may hold a prompt of megabytes."""

    async def check() -> int:
        gate, freed = threading.Event(), threading.Semaphore(0)
        threads = WorkerThreads(2)
        for _ in range(2):
            prompt = _Prompt()
            weakref.finalize(prompt, freed.release)
            work = partial(_wait, gate, prompt)
            del prompt
            with anyio.move_on_after(0.02):
                await threads.run(work)
            del work
        gate.set()
        with anyio.fail_after(20):
            for _ in range(2):  # waits for the places, which come back after the work has ended
                await threads.run(lambda: None)
        gc.collect()
        return sum([await threads.run(lambda: freed.acquire(timeout=5)) for _ in range(2)])

    assert run(check) == 2


@pytest.mark.parametrize("has_cpu_clocks", [True, False])
def test_work_is_bounded_where_the_system_has_no_clock_of_a_thread(
    run, gate, monkeypatch, has_cpu_clocks
):
    """As macOS, where the clock on the wall has to do."""
    if not has_cpu_clocks:
        monkeypatch.delattr(time, "pthread_getcpuclockid")

    def spin() -> None:
        while not gate.is_set():
            pass

    async def check() -> str:
        threads = WorkerThreads(2)
        with pytest.raises(Overrun), anyio.fail_after(20):
            await threads.run_within(0.05, spin)
        return await threads.run_within(20, lambda: "done")

    assert run(check) == "done"


def test_an_error_reaches_the_caller_and_frees_the_place(run):
    async def check() -> str:
        threads = WorkerThreads(1)
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 / 0)
        with anyio.fail_after(20):
            return await threads.run(lambda: "free")

    assert run(check) == "free"


def test_a_loop_that_closes_before_its_work_ends_is_no_trouble(run, gate):
    async def check() -> None:
        await given_up(WorkerThreads(1), gate)

    run(check)
    gate.set()
