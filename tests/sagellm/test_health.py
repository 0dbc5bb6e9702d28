"""The health of a session while an engine works, hangs and stops."""

from dataclasses import dataclass
from typing import Any, cast

import pytest
import trio
from engine_driver import put_runner
from trio.testing import MockClock

from sagellm import Graph, Sampling

LONG = Sampling(max_tokens=50, ignore_eos=True)
NULL = {
    f"{engine}.{option}": value
    for engine in "pd"
    for option, value in {"device": "null", "decode_step_s": 0.01}.items()
}


@dataclass
class GatedLaunch:
    inner: Any
    opened: trio.Event

    @property
    def batch(self) -> Any:
        return self.inner.batch

    async def result(self) -> Any:
        await self.opened.wait()
        return await self.inner.result()


@dataclass
class Gate:
    """A runner whose steps wait until the test releases them."""

    inner: Any
    opened: trio.Event
    async_scheduling = False

    def launch(self, batch: Any, after: Any = None) -> GatedLaunch:
        return GatedLaunch(self.inner.launch(batch), self.opened)

    async def close(self) -> None:
        await self.inner.close()


async def test_health_names_the_replica_that_hangs(autojump_clock: MockClock) -> None:
    async with Graph.load("pd_many").open(set=NULL) as session:
        await session.generate([1] * 8, sampling=LONG)
        healthy = session.health()
        assert not healthy.is_hung
        assert healthy.num_open == 0
        assert sum(engine.num_steps for engine in healthy.engines["d"]) == 50
        opened = trio.Event()
        for engine in cast(Any, session.executor.engines["d"]):
            gate = Gate(engine._resources.runner, opened)
            put_runner(engine, gate)
        async with session.stream([1] * 8, sampling=LONG):
            await trio.sleep(4)
            assert not session.health().is_hung
            await trio.sleep(2)
            hung = session.health()
            assert hung.is_hung
            assert hung.num_open == 1
            assert sorted(engine.is_hung for engine in hung.engines["d"]) == [False, True]
            assert max(engine.busy_for_s for engine in hung.engines["d"]) == pytest.approx(6)
            opened.set()
    assert session.health().is_stopped


def test_a_thread_may_ask() -> None:
    with Graph.load("joint").open(set={"g.device": "null"}) as session:
        session.generate([1], sampling=Sampling(max_tokens=2, ignore_eos=True))
        health = session.health()
    assert health.engines["g"][0].num_steps == 2
    assert (health.engines["g"][0].step_p99_s or 0.0) >= 0.009  # a busy machine's take longer
