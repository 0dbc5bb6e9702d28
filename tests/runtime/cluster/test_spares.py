"""Spare processes: one takes the place of a worker that died, and none is left in the end."""

import os
import signal
from collections.abc import AsyncIterator, Callable

import psutil
import pytest
import trio

from sagellm.graphs.ir import FrozenMap, Graph
from sagellm.runtime.cluster import spares
from sagellm.runtime.cluster.backoff import RestartPolicy
from sagellm.runtime.cluster.launch import Processes
from sagellm.runtime.cluster.supervisor import Supervisor
from sagellm.runtime.cluster.worker import Watch

NULL = FrozenMap({"e": FrozenMap({"model": "null", "device": "null"})})
GRAPH = Graph("g", "stream", (), (), FrozenMap({"engines": NULL}))
QUICK = Watch(ping_s=0.02, silent_s=5.0)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - of other processes
            await trio.sleep(0.01)


@pytest.fixture
async def supervisor(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Supervisor]:
    """Of one worker, with one spare; afterwards no process is left."""
    monkeypatch.setattr(spares, "QUIET_S", 0.05)
    launcher = Processes("sagellm.worker", num_spares=1)
    policy = RestartPolicy(first_s=0.05)
    one = Supervisor(GRAPH, {"e": 1}, launcher, watch=QUICK, policy=policy)
    before = set(children())
    async with trio.open_nursery() as nursery:
        await nursery.start(one.run)
        await until(lambda: len(children()) == len(before) + 2)
        yield one
        nursery.cancel_scope.cancel()
    assert set(children()) == before


def children() -> list[int]:
    return [child.pid for child in psutil.Process().children()]


def spare_of(supervisor: Supervisor) -> int:
    (worker,) = supervisor.workers
    (pid,) = set(children()) - {worker.pid}
    return pid


async def die(supervisor: Supervisor) -> None:
    """And be replaced."""
    (worker,) = supervisor.workers
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    await until(lambda: not worker.is_serving)
    await until(lambda: worker.is_serving)


async def test_a_spare_takes_the_place_of_a_worker_and_another_comes(
    supervisor: Supervisor,
) -> None:
    for _ in range(2):
        await until(lambda: len(children()) == 2)
        spare = spare_of(supervisor)
        await die(supervisor)
        assert supervisor.workers[0].pid == spare


async def test_a_spare_that_has_died_takes_nobodys_place(supervisor: Supervisor) -> None:
    spare = spare_of(supervisor)
    os.kill(spare, signal.SIGKILL)
    await until(lambda: psutil.Process(spare).status() == psutil.STATUS_ZOMBIE)
    await die(supervisor)
    assert supervisor.workers[0].pid != spare
