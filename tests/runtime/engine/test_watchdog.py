"""The watchdog reports a hang: in a step, or because no sequence can be scheduled."""

from dataclasses import dataclass, field

import pytest
import trio
from engine_driver import OWNER, put_runner, running

from sagellm.runtime.engine.kinds.modelled import (
    ModelledLaunch,
    ModelledOptions,
    ModelledRunner,
    open_modelled,
)
from sagellm.runtime.messages import SequenceState
from sagellm.runtime.port import LeaseOffer
from sagellm.runtime.sampling import Sampling

STEP_S = 0.1


@dataclass
class GatedLaunch:
    inner: ModelledLaunch
    opened: trio.Event

    @property
    def batch(self):
        return self.inner.batch

    async def result(self):
        await self.opened.wait()
        return await self.inner.result()


@dataclass
class Gate:
    """A runner that computes only while it is open."""

    inner: ModelledRunner
    opened: trio.Event = field(default_factory=trio.Event)
    async_scheduling = False

    def launch(self, batch, after=None):
        return GatedLaunch(self.inner.launch(batch), self.opened)

    async def open(self):
        await self.inner.open()

    async def close(self):
        await self.inner.close()


def open_null(**options):
    values = {"model": "null", "prefill_token_s": 0.0, "decode_step_s": STEP_S, **options}
    return open_modelled(ModelledOptions(**values), name="e")


def gated(engine):
    gate = Gate(engine._resources.runner)
    put_runner(engine, gate)
    return gate


async def test_a_step_that_does_not_end_is_a_hang_within_five_seconds(autojump_clock):
    engine = open_null()
    gate = gated(engine)
    async with running(engine) as [driver]:
        await trio.sleep(1000)
        assert not engine.health.is_hung
        await driver.submit("r", (1, 2), max_tokens=2)
        await trio.sleep(4.4)
        assert not engine.health.is_hung
        await trio.sleep(0.4)
        assert engine.health.is_hung
        assert engine.health.busy_for_s == pytest.approx(4.8)
        assert (engine.health.num_steps, engine.health.step_p99_s) == (0, None)
        await driver.submit("s", (1, 2), max_tokens=2)  # more work is no progress
        assert engine.health.is_hung
        gate.opened.set()
        await driver.all_done()
        assert not engine.health.is_hung


async def test_slow_steps_are_given_twenty_times_their_time(autojump_clock):
    engine = open_null(decode_step_s=1.0)
    async with running(engine) as [driver]:
        reply = await driver.submit("a", (1, 2), max_tokens=3)
        await reply.done.wait()
        assert engine.health.step_p99_s == pytest.approx(1.0, rel=0.02)
        gate = gated(engine)
        await driver.submit("b", (1, 2), max_tokens=3)
        await trio.sleep(19)
        assert not engine.health.is_hung
        await trio.sleep(2)
        assert engine.health.is_hung
        gate.opened.set()
        await driver.all_done()


async def test_a_sequence_that_is_never_scheduled_is_a_hang(autojump_clock):
    engine = open_null(num_blocks=8, max_model_len=128)
    async with running(engine) as [driver]:
        offer = LeaseOffer(
            request_id="x", choice=0, epoch=0, num_tokens=128, layout_hash=engine.facts.layout_hash
        )
        target = await engine.import_(offer)
        reply = await driver.submit("r", (1, 2), max_tokens=2)
        await trio.sleep(6)
        assert engine.health.is_hung
        assert engine.health.busy_for_s == 0
        target.abort()
        await reply.done.wait()
        assert not engine.health.is_hung


async def test_a_reader_that_does_not_read_is_no_hang_of_the_engine(autojump_clock):
    engine = open_null()
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    state = SequenceState(owner=OWNER, request_id="r", prompt_token_ids=(1, 2), sampling=sampling)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        await engine.submit(state)
        await trio.sleep(100)
        assert not engine.health.is_hung
        async for batch in engine.events(OWNER):
            assert not engine.health.is_hung
            if batch[-1].is_last:
                break
        nursery.cancel_scope.cancel()
    assert engine.pool.num_leased == 0


async def test_work_of_one_owner_is_no_hang_because_another_has_not_read(autojump_clock):
    engine = open_null(decode_step_s=1.0)
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    states = [
        SequenceState(owner=owner, request_id=owner, prompt_token_ids=(1, 2), sampling=sampling)
        for owner in ("idle", OWNER)
    ]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        await engine.submit(states[0])
        await trio.sleep(100)
        await engine.submit(states[1])
        assert not engine.health.is_hung
        await trio.sleep(0.5)
        assert engine.health.busy_for_s == pytest.approx(0.5)
        assert not engine.health.is_hung
        nursery.cancel_scope.cancel()
