"""What a supervisor reports of its workers: progress of a start, each life, drain and scaling."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from logged import Line, logged
from trio.testing import MockClock

from sagellm.backends.interface import Compiling, Loading, Progress, ProgressEvent
from sagellm.graphs.ir import FrozenMap, Graph
from sagellm.opening.graph_engines import open_replica
from sagellm.runtime.cluster.launch import TaskLauncher, TaskLife
from sagellm.runtime.cluster.supervisor import Supervisor
from sagellm.runtime.engine.kinds import ReplicaPlace
from sagellm.runtime.port import Engine

ENGINE = FrozenMap({"model": "null", "device": "null"})
GRAPH = Graph("g", "stream", (), (), FrozenMap({"engines": FrozenMap({"e": ENGINE})}))
START = (Compiling("cc", "/cache"), Loading("m", 1, 2))


class Lives(TaskLauncher):
    """Workers that take a while to start, and say how far they are."""

    def __init__(self) -> None:
        self.lives: list[TaskLife] = []
        super().__init__(_open)

    def launch(self, epoch: int) -> TaskLife:
        self.lives.append(super().launch(epoch))
        return self.lives[-1]


async def _open(graph: Graph, name: str, replica: int, _: int | None, progress: Progress) -> Engine:
    for event in START:
        progress(event)
    await trio.sleep(2.0)
    return await open_replica(graph, ReplicaPlace(name, replica))


@asynccontextmanager
async def supervised(told: list[ProgressEvent]) -> AsyncIterator[tuple[Supervisor, Lives]]:
    lives = Lives()
    supervisor = Supervisor(GRAPH, {"e": 2}, lives, draw=lambda: 0.5, progress=told.append)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        yield supervisor, lives
        nursery.cancel_scope.cancel()


def events(lines: list[Line]) -> list[str]:
    return [f"{line['event']} {line.get('worker', '')}".strip() for line in lines]


async def test_workers_say_how_far_their_start_is(autojump_clock: MockClock) -> None:
    told: list[ProgressEvent] = []
    async with supervised(told):
        assert told.count(START[0]) == 2
        loading = {event.model for event in told if isinstance(event, Loading)}
        assert loading == {"m (e[0])", "m (e[1])"}


async def test_each_life_is_one_line_at_its_beginning_and_its_end(
    autojump_clock: MockClock,
) -> None:
    with logged() as lines:
        async with supervised([]) as (supervisor, lives):
            assert sorted(events(lines)) == ["worker_up e[0]", "worker_up e[1]"]
            assert {(line["life"], line["seconds"]) for line in lines} == {(1, 2.0)}
            lines.clear()
            lost = next(w for w in supervisor.workers if w.pid == lives.lives[0].pid)
            lives.lives[0].kill()
            await trio.sleep(10)
            assert events(lines) == [f"worker_died {lost}", f"worker_replaced {lost}"]
            assert [line["log_level"] for line in lines] == ["warning", "info"]
            assert (lines[1]["pid"], lines[1]["life"]) == (lost.pid, 2)


async def test_what_an_operator_asks_is_one_line_each(autojump_clock: MockClock) -> None:
    async with supervised([]) as (supervisor, _):
        with logged() as lines:
            first = supervisor.workers[0]
            supervisor.drain(first)
            await supervisor.restart([first])
            await supervisor.scale("e", 1)
        assert events(lines) == [
            *("worker_drained e[0]", "worker_restarting e[0]", "worker_replaced e[0]"),
            *("scaling", "scaled"),
        ]
        assert {line["log_level"] for line in lines} == {"info"}
