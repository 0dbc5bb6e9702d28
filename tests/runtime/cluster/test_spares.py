"""Spare processes: a spare replaces a worker that died, and no spare is left in the end."""

import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass

import psutil
import pytest
import trio
from waiting import until

from sagellm.graphs.ir import FrozenMap, Graph
from sagellm.runtime.cluster import launch
from sagellm.runtime.cluster.child_process import RestartPolicy
from sagellm.runtime.cluster.launch import ProcessLauncher
from sagellm.runtime.cluster.supervisor import Supervisor
from sagellm.runtime.cluster.worker import Watch, Worker

NULL = FrozenMap({"e": FrozenMap({"model": "null", "device": "null"})})
GRAPH = Graph("g", "stream", (), (), FrozenMap({"engines": NULL}))
QUICK = Watch(ping_s=0.02, silent_s=5.0)


@dataclass
class Watched:
    """A supervisor of one worker, and the processes that were there before: of other tests."""

    supervisor: Supervisor
    before: frozenset[int]

    @property
    def worker(self) -> Worker:
        (worker,) = self.supervisor.workers
        return worker

    @property
    def children(self) -> set[int]:
        return set(children()) - self.before

    @property
    def spare(self) -> int:
        (pid,) = self.children - {self.worker.pid}
        return pid

    async def die(self) -> None:
        """And be replaced."""
        worker = self.worker
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: not worker.is_serving)
        await until(lambda: worker.is_serving)


@pytest.fixture
async def watched(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    """With one spare; afterwards no process is left."""
    monkeypatch.setattr(launch, "QUIET_S", 0.05)
    launcher = ProcessLauncher("sagellm.opening.worker_main", num_spares=1)
    policy = RestartPolicy(first_s=0.05)
    one = Supervisor(GRAPH, {"e": 1}, launcher, watch=QUICK, policy=policy)
    found = Watched(one, frozenset(children()))
    async with trio.open_nursery() as nursery:
        await nursery.start(one.run)
        await until(lambda: len(found.children) == 2)
        yield found
        nursery.cancel_scope.cancel()
    assert not found.children


def children() -> list[int]:
    return [child.pid for child in psutil.Process().children()]


async def test_a_spare_takes_the_place_of_a_worker_and_another_comes(watched: Watched) -> None:
    for _ in range(2):
        await until(lambda: len(watched.children) == 2)
        spare = watched.spare
        await watched.die()
        assert watched.worker.pid == spare


async def test_a_spare_that_has_died_takes_nobodys_place(watched: Watched) -> None:
    spare = watched.spare
    os.kill(spare, signal.SIGKILL)
    await until(lambda: psutil.Process(spare).status() == psutil.STATUS_ZOMBIE)
    await watched.die()
    assert watched.worker.pid != spare
