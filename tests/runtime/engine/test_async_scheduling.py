"""Async scheduling: the same answers, no event too many, no block freed too early.

A scripted device runs each step on a permit, so that tests meet each moment between two steps.
"""

import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import pytest
import trio
from engine_driver import OWNER, put_runner, running
from models_on_the_fly import make_model, random_prompts
from trio.testing import wait_all_tasks_blocked

from sagellm.backends import Logprob, Sampled, StepBatch
from sagellm.runtime.engine.batch import Batch, step_batch
from sagellm.runtime.engine.kinds.local import open_engine
from sagellm.runtime.engine.kinds.modelled import ModelledOptions, open_modelled
from sagellm.runtime.engine.options import EngineOptions
from sagellm.runtime.engine.output import MAX_BATCHES
from sagellm.runtime.engine.runner import DeviceQueue
from sagellm.runtime.messages import SequenceState
from sagellm.runtime.sampling import Sampling

STOP = 9


@dataclass(repr=False)
class ScriptedLaunch:
    """A launch that samples on a permit of its device. `blocks` must be the same then as now."""

    device: "Scripted"
    batch: Batch
    after: "ScriptedLaunch | None"
    numbers: StepBatch
    blocks: list[list[int]]
    sampled: list[int] | None = None

    @property
    def is_next(self):
        return self.after is not None

    @property
    def is_fed(self):
        """Whether it computes tokens that the launch before it samples."""
        return bool(self.numbers.fed)

    async def result(self):
        device = self.device
        device.launches.append(self)
        is_vain = self.is_fed and self.after.sampled is None
        if not is_vain:
            await device.permits.acquire()
        device.queued.remove(self)
        for sequence, blocks in zip(self.batch.sequences, self.blocks, strict=True):
            assert sequence.lease is None or sequence.lease.blocks[: len(blocks)] == blocks
        if len(device.launches) == device.fails_at or is_vain:
            raise RuntimeError("broken")
        for row in self.numbers.rows:
            if row.is_fed:
                row.feed(self.after.sampled)
        self.sampled = [
            device.token(row.answer.state.request_id, row.num_output) for row in self.numbers.rows
        ]
        scores = [[Logprob(0, 0.0) for _ in one.token_ids] for one in self.numbers.scored]
        return Sampled(self.sampled, prompt_logprobs=scores)

    def cancel(self):
        if not self.device.is_patient or self is self.device.queued[0]:
            return False
        self.device.queued.remove(self)
        return True


@dataclass(repr=False)
class Scripted:
    """Samples `token(request id, position)`, a step a permit; one begins when the last is over.

    Not `is_patient`: what is launched cannot be recalled, as on devices with queues of their own.
    """

    token: Callable[[str, int], int] = lambda name, position: 100 + position
    permits: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(0))
    launches: list[ScriptedLaunch] = field(default_factory=list)  # that were waited for
    queued: list[ScriptedLaunch] = field(default_factory=list)
    fails_at: int | None = None
    async_scheduling: bool = True
    is_patient: bool = True

    def launch(self, batch, after=None):
        numbers = step_batch(batch, after.batch if after else None, Future())
        blocks = [list(sequence.lease.blocks) for sequence in batch.sequences]
        self.queued.append(ScriptedLaunch(self, batch, after, numbers, blocks))
        return self.queued[-1]

    @property
    def batches(self):
        return [launch.batch for launch in self.launches]

    async def open(self):
        await trio.lowlevel.checkpoint()

    async def close(self):
        self.queued.clear()


def scripted(**options):
    """A null engine with async scheduling on a scripted device."""
    values = {"model": "null", "num_blocks": 32, "block_size": 4, "max_model_len": 64, **options}
    engine = open_modelled(ModelledOptions(**values), name="e")
    device = Scripted()
    put_runner(engine, device)
    return engine, device


async def steps(device, count=1):
    for _ in range(count):
        device.permits.release()
        await wait_all_tasks_blocked()


def names(batch):
    return [sequence.state.request_id for sequence in batch.sequences]


def sampled(max_tokens, **fields):
    return Sampling(max_tokens=max_tokens, ignore_eos=True, seed=1, **fields)


async def test_the_next_step_takes_the_tokens_of_the_step_before():
    engine, device = scripted()
    async with running(engine) as [driver]:
        reply = await driver.submit("r", (1, 2), sampling=sampled(5))
        await wait_all_tasks_blocked()
        await steps(device, 5)
        assert reply.token_ids == [100, 101, 102, 103, 104]
        assert [launch.is_fed for launch in device.launches] == [False, True, True, True, True]
        rows = [row for launch in device.launches[1:] for row in launch.numbers.rows]
        assert [row.added for row in rows] == [(token,) for token in reply.token_ids[:-1]]


async def test_blocks_of_an_ended_sequence_stay_leased_until_the_next_step_is_over():
    engine, device = scripted()
    device.token = lambda name, position: STOP if position == 1 else 100
    idle_with = []

    async def idle():
        await engine.idle()
        idle_with.append(engine.pool.num_leased)

    async with running(engine) as [driver], trio.open_nursery() as nursery:
        reply = await driver.submit("r", (1, 2), sampling=sampled(9, stop_token_ids=(STOP,)))
        await wait_all_tasks_blocked()
        await steps(device, 2)
        assert reply.last.finish_reason == "stop"
        assert len(device.batches) == 3
        assert engine.pool.num_leased == 1
        engine.pool.check()
        nursery.start_soon(idle)
        await wait_all_tasks_blocked()
        assert not idle_with
        await steps(device)
        assert idle_with == [0]
    assert reply.token_ids == [100, STOP]  # `running` has read on: no event came after the end
    assert len(device.batches) == 3


async def test_a_new_sequence_may_take_the_name_of_one_whose_step_is_not_over():
    engine, device = scripted()
    device.token = lambda name, position: STOP if position == 1 else 100
    async with running(engine) as [driver]:
        first = await driver.submit("r", (1, 2), sampling=sampled(9, stop_token_ids=(STOP,)))
        await wait_all_tasks_blocked()
        await steps(device, 2)
        assert first.done.is_set()
        second = await driver.submit("r", (1, 2), sampling=sampled(1))
        await steps(device)
        assert second.token_ids == []  # that was the step of the first
        await steps(device)
        assert second.token_ids == [100]


async def test_a_sequence_that_ends_by_length_is_not_computed_once_more():
    engine, device = scripted()
    async with running(engine) as [driver]:
        await driver.submit("short", (1, 2), sampling=sampled(2))
        await driver.submit("long", (1, 2), sampling=sampled(4))
        await wait_all_tasks_blocked()
        await steps(device, 5)
        await driver.all_done()
    assert sum("short" in names(batch) for batch in device.batches) == 2
    assert sum("long" in names(batch) for batch in device.batches) == 4


async def test_an_arrival_cancels_the_next_step_and_joins_in_its_place():
    engine, device = scripted()
    async with running(engine) as [driver]:
        await driver.submit("a", (1, 2), sampling=sampled(6))
        await wait_all_tasks_blocked()
        await steps(device, 2)
        await driver.submit("b", (1, 2), sampling=sampled(2))
        await steps(device)
        assert "b" in names(device.batches[-1])
        assert not device.launches[-1].is_next
        await steps(device, 5)
        await driver.all_done()
        assert driver.replies["a", 0].token_ids == [100, 101, 102, 103, 104, 105]


async def test_a_cancel_cancels_the_next_step_and_frees_the_blocks_after_the_launched_one():
    engine, device = scripted()
    async with running(engine) as [driver]:
        reply = await driver.submit("a", (1, 2), sampling=sampled(6))
        await wait_all_tasks_blocked()
        await steps(device, 1)
        engine.cancel("a", 0, 0)
        assert engine.pool.num_leased > 0
        await steps(device)
        assert engine.pool.num_leased == 0
        assert reply.last.finish_reason == "cancelled"
        assert reply.token_ids == [100]
    assert len(device.batches) == 2


async def test_a_reader_that_does_not_read_has_no_more_sampled_for_it_than_its_mailbox_holds():
    engine, device = scripted()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        await engine.submit(
            SequenceState(
                owner=OWNER, request_id="r", prompt_token_ids=(1, 2), sampling=sampled(40)
            )
        )
        await wait_all_tasks_blocked()
        await steps(device, 2 * MAX_BATCHES)
        assert len(device.batches) == MAX_BATCHES
        nursery.cancel_scope.cancel()


async def test_the_step_after_one_that_fails_fails_with_it_and_the_engine_goes_on():
    engine, device = scripted()
    device.fails_at = 2
    async with running(engine) as [driver]:
        broken = await driver.submit("a", (1, 2), sampling=sampled(6))
        await wait_all_tasks_blocked()
        await steps(device, 2)
        assert broken.last.finish_reason == "failed"
        assert engine.pool.num_leased == 0
        fine = await driver.submit("b", (1, 2), sampling=sampled(2))
        await wait_all_tasks_blocked()
        await steps(device, 2)
        assert fine.token_ids == [100, 101]


async def test_where_blocks_run_out_the_scheduler_says_who_is_preempted():
    engine, device = scripted(num_blocks=4, max_model_len=16)
    async with running(engine) as [driver]:
        for number, name in enumerate("ab"):
            await driver.submit(name, (1, 2, number), sampling=sampled(9))
        await wait_all_tasks_blocked()
        await steps(device, 30)
        await driver.all_done()
        assert engine.load.num_preemptions > 0
        assert all(len(reply.token_ids) == 9 for reply in driver.replies.values())


async def test_equal_blocks_are_merged_but_never_beneath_a_step_that_reads_them():
    engine, device = scripted()
    async with running(engine) as [driver]:
        for name in "ab":
            await driver.submit(name, (1, 2, 3), sampling=sampled(12))
        await wait_all_tasks_blocked()
        await steps(device, 2)
        first, second = (lease.tables[0] for lease in engine.pool.leases)
        is_merged = []
        for _ in range(8):  # the device itself sees to it that no block of a step is exchanged
            is_merged.append(first[0] == second[0])
            await steps(device)
        assert not is_merged[0]
        assert is_merged[-1]
        await steps(device, 8)
        await driver.all_done()


async def test_next_steps_are_launched_while_a_prompt_is_chunked():
    engine, device = scripted(max_num_batched_tokens=8, max_model_len=128)
    async with running(engine) as [driver]:
        decoding = await driver.submit("a", (1, 2), sampling=sampled(9))
        await wait_all_tasks_blocked()
        await steps(device, 2)
        prompt = await driver.submit("b", tuple(range(30)), sampling=sampled(2))
        await steps(device, 2)  # the first is under way without it
        began = len(device.launches)
        await steps(device, 4)
        chunked = device.launches[began:]
        assert all(names(launch.batch) == ["a", "b"] for launch in chunked)
        assert all(launch.is_next for launch in chunked)
        await steps(device, 9)
        await driver.all_done()
        assert decoding.token_ids == [100 + position for position in range(9)]
        assert prompt.token_ids == [100, 101]


async def test_the_last_chunk_of_a_prompt_feeds_the_step_after_it():
    engine, device = scripted(max_num_batched_tokens=8)
    async with running(engine) as [driver]:
        reply = await driver.submit("a", tuple(range(20)), sampling=sampled(3))
        await wait_all_tasks_blocked()
        await steps(device, 5)
        assert reply.token_ids == [100, 101, 102]
    assert [launch.batch.query_lens for launch in device.launches] == [[8], [8], [4], [1], [1]]
    assert [launch.is_next for launch in device.launches] == [False, True, True, True, True]
    assert [launch.is_fed for launch in device.launches] == [False, False, False, True, True]


async def test_next_steps_are_launched_while_requests_wait():
    """A waiting sequence takes the place of one that ends by its length in the very next step."""
    engine, device = scripted(max_num_seqs=2)
    async with running(engine) as [driver]:
        for number, (name, count) in enumerate((("a", 3), ("b", 6), ("c", 3), ("d", 3))):
            await driver.submit(name, (1, number), sampling=sampled(count))
        await wait_all_tasks_blocked()
        await steps(device, 12)
        await driver.all_done()
    batches = [names(batch) for batch in device.batches]

    def steps_of(name):
        return [number for number, batch in enumerate(batches) if name in batch]

    assert steps_of("c")[0] == steps_of("a")[-1] + 1
    assert steps_of("d")[0] == min(steps_of("b")[-1], steps_of("c")[-1]) + 1
    assert all(launch.is_next for launch in device.launches[steps_of("b")[0] + 1 :])


async def test_an_arrival_that_cannot_start_recalls_nothing():
    engine, device = scripted(max_num_seqs=1)
    async with running(engine) as [driver]:
        await driver.submit("a", (1, 2), sampling=sampled(6))
        await wait_all_tasks_blocked()
        await steps(device, 1)
        await driver.submit("b", (1, 2), sampling=sampled(1))
        assert len(device.queued) == 2
        await steps(device, 6)
        await driver.all_done()
    assert all(launch.is_next for launch in device.launches[1:])


@pytest.mark.parametrize("is_patient", [True, False])
async def test_a_sequence_admitted_to_the_next_step_keeps_its_blocks_until_that_is_over(is_patient):
    engine, device = scripted(max_num_seqs=1)
    device.is_patient = is_patient
    async with running(engine) as [driver]:
        await driver.submit("a", (1, 2), sampling=sampled(2))
        late = await driver.submit("b", (1, 2, 3), sampling=sampled(4))
        await wait_all_tasks_blocked()
        await steps(device)
        assert [names(launch.batch) for launch in device.queued] == [["a"], ["b"]]
        engine.cancel("b", 0, 0)
        assert engine.pool.num_leased == (1 if is_patient else 2)
        await steps(device)
        assert engine.pool.num_leased == (0 if is_patient else 1)
        await steps(device)
        assert late.last.finish_reason == "cancelled"
        assert engine.pool.num_leased == 0


async def test_a_sequence_admitted_after_a_step_that_fails_is_computed_again():
    engine, device = scripted(max_num_seqs=1)
    device.fails_at = 2
    async with running(engine) as [driver]:
        broken = await driver.submit("a", (1, 2), sampling=sampled(2))
        fine = await driver.submit("b", (1, 2, 3), sampling=sampled(2))
        await wait_all_tasks_blocked()
        await steps(device, 5)
        assert broken.last.finish_reason == "failed"
        assert fine.token_ids == [100, 101]


async def test_a_sequence_cancelled_in_the_step_after_one_that_failed_ends():
    engine, device = scripted(max_num_seqs=1)
    device.is_patient, device.fails_at = False, 2
    async with running(engine) as [driver]:
        broken = await driver.submit("a", (1, 2), sampling=sampled(2))
        late = await driver.submit("b", (1, 2, 3), sampling=sampled(2))
        await wait_all_tasks_blocked()
        await steps(device, 2)
        assert names(device.batches[-1]) == ["b"]
        engine.cancel("b", 0, 0)
        await steps(device)
        assert broken.last.finish_reason == "failed"
        assert late.last.finish_reason == "cancelled"
        assert engine.pool.num_leased == 0


# ---- on a device that computes ---------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model("qwen3", tmp_path_factory.mktemp("qwen3"))


def open_on(folder, *, async_scheduling, **options):
    options = {"model": str(folder), "deterministic": True, "max_model_len": 256, **options}
    engine = open_engine(EngineOptions(**options), name="e")
    if not async_scheduling:
        put_runner(engine, replace(engine._resources.runner, async_scheduling=False))
    return engine


def some_sampling(draw):
    """Greedy, seeded, with penalties, with stops: everything that sampling may depend on."""
    fields = {"max_tokens": draw.randrange(4, 40), "ignore_eos": draw.random() < 0.5, "seed": 3}
    if draw.random() < 0.6:
        fields |= {"temperature": 2.0, "top_k": 40, "top_p": 0.95}
    if draw.random() < 0.4:
        fields |= {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2}
    if draw.random() < 0.4:
        fields |= {"stop_token_ids": tuple(range(60, 90)), "min_tokens": 3}
    if draw.random() < 0.3:
        fields |= {"logprobs": 2, "prompt_logprobs": 1}
    return Sampling(**fields)


async def traffic(engine, seed, monkeypatch):
    """The replies to random arrivals, some of which are cancelled."""
    draw = random.Random(seed)
    prompts = random_prompts((3, 20, 45, 90))
    num_next, launch = 0, DeviceQueue.launch

    def counting(self, program, storage, batch, after):
        nonlocal num_next
        num_next += after is not None
        return launch(self, program, storage, batch, after)

    monkeypatch.setattr(DeviceQueue, "launch", counting)
    cancelled = set()
    async with running(engine) as [driver]:
        for number in range(24):
            name, sampling = str(number), some_sampling(draw)
            await driver.submit(name, draw.choice(prompts), sampling=sampling)
            is_cancelled, pause = draw.random() < 0.2, draw.choice((0, 1, 5, 40))
            for _ in range(pause):
                await trio.sleep(0.0005)
                engine.pool.check()
            if is_cancelled:
                cancelled.add(name)
                engine.cancel(name, 0, 0)
        await driver.all_done()
    monkeypatch.undo()
    return driver.replies, cancelled, num_next


@pytest.mark.parametrize("options", [{}, {"num_blocks": 16, "max_num_batched_tokens": 32}])
@pytest.mark.parametrize("seed", range(3))
async def test_answers_are_the_same_with_and_without_async_scheduling(
    folder, seed, options, monkeypatch
):
    answers, cancelled, count = await traffic(
        open_on(folder, async_scheduling=True, **options), seed, monkeypatch
    )
    alone, _, none = await traffic(
        open_on(folder, async_scheduling=False, **options), seed, monkeypatch
    )
    assert count > 20
    assert none == 0
    for (name, choice), reply in answers.items():
        other = alone[name, choice]
        if name in cancelled:
            size = min(len(reply.token_ids), len(other.token_ids))
            assert reply.token_ids[:size] == other.token_ids[:size]
            continue
        assert reply.token_ids == other.token_ids
        assert reply.text == other.text
        assert reply.last.finish_reason == other.last.finish_reason
        assert reply.last.stop_reason == other.last.stop_reason
        logprobs = [[one.token_id for one in event.logprobs] for event in reply.events]
        assert logprobs == [[one.token_id for one in event.logprobs] for event in other.events]


async def test_an_engine_that_stops_between_two_steps_leaves_nothing_running(folder):
    for pause in range(8):
        engine = open_on(folder, async_scheduling=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.run)
            await engine.submit(
                SequenceState(
                    owner=OWNER, request_id="r", prompt_token_ids=(1, 2), sampling=sampled(90)
                )
            )
            engine.events(OWNER)
            await trio.sleep(0.0007 * pause)
            nursery.cancel_scope.cancel()
        assert engine.pool.num_leased == 0
        engine.pool.check()
