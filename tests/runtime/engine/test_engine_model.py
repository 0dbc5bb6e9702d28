"""The engine model gives the token times of the modelled engine, in few changes of the batch."""

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import trio
import trio.testing
from engine_driver import Driver
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.runtime.engine.engine_model import EngineModel
from sagellm.runtime.engine.kinds.modelled import ModelledOptions, open_modelled
from sagellm.runtime.engine.options import Limits
from sagellm.runtime.engine.step_cost import StepCost

TICK = 2.0**-10  # costs are multiples of it: sums of them are exact
PLENTY = 10_000  # blocks


@dataclass(frozen=True)
class Asked:
    """One sequence. Arrivals differ by less than a tick, so none meets the end of a step."""

    number: int
    tick: int
    num_prompt: int
    num_output: int
    cancel_tick: int | None = None
    priority: int = 2

    @property
    def key(self):
        return f"r{self.number}", 0

    @property
    def arrives_s(self):
        return self.tick * TICK + (self.number + 1) * 2.0**-20 if self.tick else 0.0

    @property
    def cancelled_s(self):
        if self.cancel_tick is None:
            return None
        return (self.tick + self.cancel_tick) * TICK + (self.number + 1) * 2.0**-20 + 2.0**-25


@dataclass(frozen=True)
class Seen:
    """One sequence: times of its first and last token, number of tokens, and why it ended."""

    first_s: float | None
    last_s: float
    num_tokens: int
    end: str


def options_of(limits, ticks, num_blocks, *, caching=True):
    step, token, pair, row, context = (count * TICK for count in ticks)
    return ModelledOptions(
        model="null",
        max_model_len=512,
        num_blocks=num_blocks,
        block_size=4,
        prefix_caching=caching,
        decode_step_s=step,
        prefill_token_s=token,
        prefill_pair_s=pair,
        decode_row_s=row,
        context_token_s=context,
        **limits,
    )


def by_engine(options, workload):
    """The outcome of the engine, on trio's clock."""
    seen = {}

    async def one(driver, asked):
        await trio.sleep_until(asked.arrives_s)
        await follow(driver, asked, await submit(driver, asked))

    async def follow(driver, asked, reply):
        if asked.cancelled_s is not None:
            with trio.move_on_at(asked.cancelled_s):
                await reply.done.wait()
            driver.engine.cancel(*asked.key, 0)
        await reply.done.wait()
        tokens = [event for event in reply.events if event.token_ids]
        first_s = tokens[0].stamps.prefilled_s if tokens else None
        seen[asked.key] = Seen(
            first_s, reply.last.stamps.finished_s, len(reply.token_ids), reply.last.finish_reason
        )

    def submit(driver, asked):
        prompt = [asked.number + 1] * asked.num_prompt
        fields = {"max_tokens": asked.num_output, "priority": asked.priority}
        return driver.submit(asked.key[0], prompt, **fields)

    async def main():
        engine = open_modelled(options, name="e")
        at_once = [asked for asked in workload if not asked.tick]
        async with trio.open_nursery() as nursery:
            driver = Driver(engine)
            begun = [(asked, await submit(driver, asked)) for asked in at_once]
            nursery.start_soon(engine.run)
            nursery.start_soon(driver.read)
            async with trio.open_nursery() as asking:
                for asked, reply in begun:
                    asking.start_soon(follow, driver, asked, reply)
                for asked in workload:
                    if asked.tick:
                        asking.start_soon(one, driver, asked)
            nursery.cancel_scope.cancel()
        return engine.load.num_preemptions

    clock = trio.testing.MockClock(autojump_threshold=0)
    return seen, trio.run(main, clock=clock)


def model_of(options):
    return EngineModel(
        options.cost, options.limits, num_blocks=options.num_blocks, block_size=options.block_size
    )


def by_model(options, workload):
    """The outcome of the model, in as few steps as it can."""
    model = model_of(options)
    happen = [(asked.arrives_s, 0, asked.number, asked) for asked in workload]
    happen += [
        (asked.cancelled_s, 1, asked.number, asked)
        for asked in workload
        if asked.cancelled_s is not None
    ]
    progress = []
    for at_s, is_cancel, _, asked in sorted(happen, key=lambda one: one[:3]):
        while model.next_at < at_s:
            progress += model.advance(model.next_at)
        if is_cancel:
            model.cancel(asked.key, at_s)
        else:
            numbers = {"num_prompt": asked.num_prompt, "num_output": asked.num_output}
            model.submit(asked.key, at_s, priority=asked.priority, **numbers)
    while model.next_at < float("inf"):
        progress += model.advance(model.next_at)
    assert model.load.num_free_blocks == options.num_blocks
    return {asked.key: seen_in(progress, asked.key) for asked in workload}, model


def seen_in(progress, key):
    own = [one for one in progress if one.key == key]
    tokens = [one for one in own if one.num_tokens]
    assert [one.end for one in own[:-1]] == [None] * (len(own) - 1)
    first_s = tokens[0].at_s if tokens else None
    return Seen(first_s, own[-1].at_s, sum(one.num_tokens for one in own), own[-1].end)


ASKED = st.builds(
    Asked,
    number=st.just(0),
    tick=st.one_of(st.just(0), st.integers(1, 600)),
    num_prompt=st.integers(1, 60),
    num_output=st.integers(1, 40),
    cancel_tick=st.one_of(st.none(), st.none(), st.integers(0, 300)),
    priority=st.integers(1, 3),
)
WORKLOADS = st.lists(ASKED, min_size=1, max_size=8).map(
    lambda every: [
        Asked(n, one.tick, one.num_prompt, one.num_output, one.cancel_tick, one.priority)
        for n, one in enumerate(every)
    ]
)
LIMITS = st.fixed_dictionaries(
    {
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.sampled_from([2, 5, 16, 64, 512]),
        "prefill_chunk": st.one_of(st.none(), st.integers(1, 20)),
    }
)
TICKS = st.tuples(st.integers(1, 20), *(st.integers(0, 3) for _ in range(4)))


@settings(max_examples=60, deadline=None)
@given(WORKLOADS, LIMITS, TICKS)
def test_token_times_are_those_of_the_engine(workload, limits, ticks):
    options = options_of(limits, ticks, PLENTY)
    seen, _ = by_engine(options, workload)
    assert by_model(options, workload)[0] == seen


@settings(max_examples=40, deadline=None)
@given(WORKLOADS, LIMITS, TICKS, st.integers(25, 60))
def test_a_full_pool_preempts_as_the_engine_does_without_prefix_caching(
    workload, limits, ticks, num_blocks
):
    uncancelled = [replace(asked, cancel_tick=None, priority=2) for asked in workload]
    whole = options_of(limits, ticks, num_blocks, caching=False)
    options = replace(whole, max_model_len=4 * num_blocks)
    seen, num_preemptions = by_engine(options, uncancelled)
    found, model = by_model(options, uncancelled)
    assert (found, model.num_preemptions) == (seen, num_preemptions)


def test_the_last_in_rank_is_preempted_and_computed_again():
    workload = [Asked(number, 0, 16, 24) for number in range(3)]
    options = options_of({"max_num_seqs": 8}, (10, 1, 0, 1, 0), 16, caching=False)
    options = replace(options, max_model_len=64)
    seen, num_preemptions = by_engine(options, workload)
    found, model = by_model(options, workload)
    assert (found, model.num_preemptions) == (seen, num_preemptions)
    assert num_preemptions > 0


def run_alone(model, **numbers):
    model.submit(("r", 0), 0.0, **numbers)
    progress = []
    while model.next_at < float("inf"):
        progress += model.advance(model.next_at)
    return progress


def test_a_hundred_thousand_tokens_cost_few_changes():
    cost = StepCost(0.01, 1e-4, context_token_s=1e-8)
    model = EngineModel(cost, Limits(64, 512), num_blocks=PLENTY, block_size=16)
    first, last = run_alone(model, num_prompt=100, num_output=100_000)
    assert model.num_changes <= 3
    assert model.num_steps == 100_000
    assert (first.num_tokens, last.num_tokens, last.end) == (1, 99_999, "length")
    decoded_s = sum(0.01 + 1e-8 * (100 + number) for number in range(1, 100_000))
    assert last.at_s - first.at_s == pytest.approx(decoded_s, rel=1e-12)


def test_changes_grow_with_arrivals_and_ends_not_with_tokens():
    model = EngineModel(StepCost(0.01, 0.0), Limits(64, 512), num_blocks=PLENTY, block_size=16)
    for number in range(50):
        model.submit((f"r{number}", 0), number * 1.0, num_prompt=10, num_output=3000)
    while model.next_at < float("inf"):
        model.advance(model.next_at)
    assert model.num_changes <= 4 * 50


def test_cached_tokens_are_not_computed():
    cost = StepCost(0.0, 1.0)
    model = EngineModel(cost, Limits(64, 512), num_blocks=PLENTY, block_size=16)
    assert run_alone(model, num_prompt=100, num_output=1, num_cached=64)[0].at_s == 36.0


def test_a_sequence_that_resumes_goes_on_after_its_tokens():
    model = EngineModel(StepCost(1.0, 0.0), Limits(64, 512), num_blocks=PLENTY, block_size=16)
    numbers = {"num_prompt": 8, "num_emitted": 4, "num_output": 10, "num_cached": 11}
    first, last = run_alone(model, **numbers)
    assert (first.num_tokens, first.at_s) == (1, 1.0)
    assert (last.num_tokens, last.at_s, last.end) == (5, 6.0, "length")


def test_what_the_pool_cannot_hold_is_refused():
    model = EngineModel(StepCost(1.0, 0.0), Limits(64, 512), num_blocks=4, block_size=16)
    with pytest.raises(ValueError, match="does not fit the pool of 4 blocks"):
        model.submit(("r", 0), 0.0, num_prompt=60, num_output=5)
    with pytest.raises(ValueError, match="no tokens to compute"):
        model.submit(("r", 0), 0.0, num_prompt=0, num_output=5)


def test_the_load_is_that_of_the_last_change():
    model = EngineModel(StepCost(1.0, 0.0), Limits(1, 512), num_blocks=20, block_size=16)
    for name in "ab":
        model.submit((name, 0), 0.0, num_prompt=20, num_output=5)
    model.advance(0.5)
    load = model.load
    assert (load.num_running, load.num_waiting, load.num_leased_blocks) == (1, 1, 2)
    assert load.num_pending_prefill_tokens == 20 + 20


def test_importing_the_model_imports_neither_trio_nor_torch():
    program = (
        "import sys, sagellm.runtime.engine.engine_model; "
        "sys.exit(' '.join({'trio', 'torch'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
