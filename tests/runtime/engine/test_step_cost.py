"""The cost of a step, and of a run of steps."""

import pytest
import trio
from engine_driver import running
from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.engine.kinds.modelled import ModelledOptions, open_modelled
from sagellm.runtime.engine.step_cost import StepCost, StepShape, step_shape

COST = StepCost(8.0, 4.0, 2.0, 1.0, 0.5)


def test_a_chunk_attends_to_what_is_before_it():
    assert step_shape([(16, 4, 100)]) == StepShape(4, 4 * 16 + 10, 0, 20, 1, 20)


def test_the_last_token_of_a_prompt_is_a_prefill_token():
    assert step_shape([(39, 1, 40)]) == StepShape(1, 40, 0, 40, 1, 40)
    assert step_shape([(40, 1, 40)]) == StepShape(0, 0, 1, 41)
    assert step_shape([(0, 1, 1)]) == StepShape(1, 1, 0, 1, 1, 1)


def test_an_answer_that_is_computed_again_is_prefill():
    assert step_shape([(48, 8, 40)]).num_prefill_tokens == 8


def test_each_coefficient_counts_once():
    assert COST.seconds(StepShape(3, 5, 7, 11)) == 8 + 3 * 4 + 5 * 2 + 7 * 1 + 11 * 0.5


@given(st.lists(st.integers(1, 500), max_size=20), st.integers(0, 60))
def test_a_run_costs_what_its_steps_cost(contexts, num_steps):
    def shape(step):
        return step_shape((context + step, 1, 0) for context in contexts)

    alone = sum(COST.seconds(shape(step)) for step in range(num_steps))
    assert COST.run_seconds(shape(0), num_steps) == alone


@pytest.mark.parametrize(
    ("options", "first_s", "rest_s"),
    [
        ({"prefill_token_s": 0.5, "decode_step_s": 2.0}, 22.0, 4.0),
        ({"prefill_token_s": 0.5, "decode_step_s": 0.0, "prefill_chunk": 39}, 20.0, 0.0),
        ({"prefill_pair_s": 1.0, "prefill_token_s": 0.0, "decode_step_s": 0.0}, 820.0, 0.0),
        ({"decode_row_s": 3.0, "prefill_token_s": 0.0, "decode_step_s": 0.0}, 0.0, 6.0),
        ({"context_token_s": 1.0, "prefill_token_s": 0.0, "decode_step_s": 0.0}, 40.0, 41 + 42),
    ],
)
async def test_the_engine_takes_what_the_model_says(autojump_clock, options, first_s, rest_s):
    """The rows of a prompt of 40 tokens and an answer of three tokens."""
    async with running(open_modelled(ModelledOptions(model="null", **options), name="e")) as [e]:
        begun_s = trio.current_time()
        reply = await e.submit("r", range(1, 41), max_tokens=3)
        await reply.done.wait()
        stamps = reply.last.stamps
    assert stamps.prefilled_s - begun_s == pytest.approx(first_s)
    assert stamps.finished_s - stamps.prefilled_s == pytest.approx(rest_s)
