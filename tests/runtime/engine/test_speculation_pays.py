"""Drafting goes on where it pays, and ends where it does not. Steps take given times."""

from dataclasses import dataclass

import pytest
import trio
from engine_driver import running

from sagellm.backends import Sampled
from sagellm.runtime.engine.batch import Batch, rows_of
from sagellm.runtime.engine.kinds.modelled import ModelledStorage
from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.runtime.engine.options import Limits
from sagellm.runtime.engine.runner import EngineResources
from sagellm.runtime.engine.speculation import Speculation
from sagellm.runtime.port import EngineFacts

FACTS = EngineFacts("m", 2048, 64, block_size=16, num_blocks=1024, kv_block_bytes=1)
MEMORY_BOUND, COMPUTE_BOUND = (0.02, 0.0), (0.0, 0.001)  # seconds a step, and a row


def token(position):
    return position * position % 97


@dataclass
class CountingLaunch:
    batch: Batch
    seconds: float

    async def result(self):
        await trio.sleep(self.seconds)
        return Sampled([token(row.num_output) for row in rows_of(self.batch)])


@dataclass
class CountingRunner:
    """The token at each position is known, and a step takes a given time."""

    step_s: float
    row_s: float
    async_scheduling = False

    def launch(self, batch, after=None):
        return CountingLaunch(batch, self.step_s + self.row_s * batch.num_tokens)

    async def open(self):
        await trio.lowlevel.checkpoint()

    async def close(self):
        pass


@dataclass
class Guesses:
    """Drafts that are all right, or all wrong. Each takes `token_s`."""

    is_right: bool = True
    token_s: float = 0.0

    async def draft(self, wanted):
        await trio.sleep(self.token_s * sum(wanted.values()))
        shift = 0 if self.is_right else 97
        return {
            sequence: [token(sequence.num_output + at) + shift for at in range(count)]
            for sequence, count in wanted.items()
        }

    def forget(self, sequence):
        pass

    def clear(self):
        pass


async def serve(costs, drafter, *, num_sequences=1, num_tokens=256):
    """Seconds until all answers were complete, and the engine's load."""
    speculation = Speculation(drafter, 4) if drafter else None
    resources = EngineResources(
        FACTS, Limits(64, 512), CountingRunner(*costs), ModelledStorage(1, 1e9), 200,
        speculation=speculation,
    )  # fmt: skip
    engine = LocalEngine(resources, name="e")
    started = trio.current_time()
    async with running(engine) as [driver]:
        for index in range(num_sequences):
            await driver.submit(str(index), [1, 2, 3], max_tokens=num_tokens)
        await driver.all_done()
        seconds = trio.current_time() - started
        right = [token(position) for position in range(num_tokens)]
        assert all(reply.token_ids == right for reply in driver.replies.values())
    return seconds, engine.load


async def test_right_drafts_pay_where_rows_ride_along(autojump_clock):
    plain, _ = await serve(MEMORY_BOUND, None)
    drafting, load = await serve(MEMORY_BOUND, Guesses())
    assert drafting < plain / 4
    assert load.drafts.num_accepted_tokens == load.drafts.num_draft_tokens


async def test_right_drafts_end_where_a_row_costs_a_token(autojump_clock):
    plain, _ = await serve(COMPUTE_BOUND, None, num_sequences=32)
    drafting, load = await serve(COMPUTE_BOUND, Guesses(), num_sequences=32)
    assert drafting < 1.02 * plain
    assert 0 < load.drafts.num_draft_tokens < 0.1 * 32 * 256


@pytest.mark.parametrize("costs", [MEMORY_BOUND, COMPUTE_BOUND, (0.02, 0.002)])
async def test_wrong_drafts_end(costs, autojump_clock):
    plain, _ = await serve(costs, None)
    drafting, load = await serve(costs, Guesses(is_right=False))
    assert load.drafts.num_accepted_tokens == 0
    assert load.drafts.num_draft_tokens <= 4 + 2 + 1 + 5
    assert drafting < 1.05 * plain


async def test_a_slow_drafter_ends(autojump_clock):
    plain, _ = await serve(MEMORY_BOUND, None)
    drafting, load = await serve(MEMORY_BOUND, Guesses(token_s=0.03))
    assert load.drafts.num_draft_tokens < 16
    assert drafting < 1.1 * plain


async def test_a_drafter_that_pays_its_way_goes_on(autojump_clock):
    plain, _ = await serve(MEMORY_BOUND, None)
    drafting, _ = await serve(MEMORY_BOUND, Guesses(token_s=0.002))
    assert drafting < plain / 2.5


async def test_the_same_run_twice_drafts_the_same(autojump_clock):
    costs = (0.01, 0.0007)
    first = await serve(costs, Guesses(), num_sequences=5)
    again = await serve(costs, Guesses(), num_sequences=5)
    assert first[0] == pytest.approx(again[0])
    assert first[1].drafts == again[1].drafts


async def test_steps_without_drafts_are_measured_now_and_then(autojump_clock):
    _, load = await serve(MEMORY_BOUND, Guesses(), num_tokens=1000)
    num_plain = load.num_steps - 1 - load.drafts.num_drafts
    assert 2 <= num_plain <= 6
