"""The worker: one thread for all jobs, errors passed on, nothing left behind."""

import threading

import pytest
import trio

from sagellm.runtime.engine.worker import Worker


@pytest.fixture
def worker():
    return Worker("test-worker")


def named_threads():
    return [thread for thread in threading.enumerate() if thread.name == "test-worker"]


async def test_all_jobs_run_on_one_thread(worker):
    worker.start()
    idents = {await worker.run(threading.get_ident) for _ in range(5)}
    worker.stop()
    assert len(idents) == 1
    assert threading.get_ident() not in idents


async def test_an_error_reaches_the_caller(worker):
    worker.start()
    with pytest.raises(ZeroDivisionError):
        await worker.run(lambda: 1 // 0)
    assert await worker.run(lambda: 3) == 3
    worker.stop()


async def test_stopping_leaves_no_thread(worker):
    worker.start()
    assert len(named_threads()) == 1
    worker.stop()
    worker.stop()
    assert named_threads() == []


async def test_cancellation_waits_for_the_job(worker):
    worker.start()
    release, finished = threading.Event(), []

    def job():
        release.wait()
        finished.append(True)

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run, job)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            release.set()
    assert finished == [True]
    assert scope.cancelled_caught
    worker.stop()
