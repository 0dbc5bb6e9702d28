"""A task that waits for launches is woken by the thread of the device."""

import os
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import trio
import trio.testing

from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.runner import DeviceLaunch, DeviceQueue, Wakeup

DESCRIPTORS = Path("/proc/self/fd")
MORE_THAN_A_PIPE_HOLDS = 100_000


@pytest.fixture
def wakeup():
    made = Wakeup()
    yield made
    made.close()


async def test_launches_end_in_order_whenever_their_wake_ups_are_read(wakeup):
    tickets = [Future() for _ in range(3)]
    launches = [DeviceLaunch(Batch(), ticket, wakeup) for ticket in tickets]

    def compute():
        for number, ticket in enumerate(tickets):
            ticket.set_result(number)

    thread = threading.Thread(target=compute)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, thread.start)
            assert [await launch.result() for launch in launches] == [0, 1, 2]
    thread.join()


async def test_a_wake_up_for_an_earlier_launch_ends_no_wait(wakeup):
    earlier, ticket = Future(), Future()
    launches = [DeviceLaunch(Batch(), one, wakeup) for one in (earlier, ticket)]
    earlier.set_result(None)
    assert await launches[0].result() is None
    ended = trio.Event()

    async def wait():
        await launches[1].result()
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not ended.is_set()
        ticket.set_result(None)


async def test_other_tasks_run_between_launches_that_have_ended(wakeup):
    turns = []

    async def other():
        while True:
            turns.append(None)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(20):
            ticket = Future()
            ticket.set_result(None)
            await DeviceLaunch(Batch(), ticket, wakeup).result()
        nursery.cancel_scope.cancel()
    assert len(turns) >= 19


async def test_wake_ups_that_nobody_reads_do_not_block_the_device(wakeup):
    for _ in range(MORE_THAN_A_PIPE_HOLDS):
        wakeup.wake()
    with trio.fail_after(10):
        await wakeup.wait()


@pytest.mark.skipif(not DESCRIPTORS.exists(), reason="descriptors are counted in /proc")
async def test_the_pipe_is_closed_with_the_queue():
    class Device:
        def open_queue(self, threads):
            return self

        def close(self):
            pass

    queue, before = DeviceQueue(Device()), len(os.listdir(DESCRIPTORS))
    for _ in range(3):
        queue.open()
        assert len(os.listdir(DESCRIPTORS)) == before + 2
        await queue.close()
    assert len(os.listdir(DESCRIPTORS)) == before
