"""The blocks of a modelled pool: shared, evicted, reserved and kept, and never lost."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.containers import value_of
from sagellm.runtime.engine.block_model import BlockModel, KeptBlocks
from sagellm.runtime.engine.engine_model import EngineModel
from sagellm.runtime.engine.options import Limits
from sagellm.runtime.engine.step_cost import StepCost


@dataclass(eq=False)
class Holder:
    keys: tuple[bytes, ...] = ()
    num_blocks: int = 0
    spans: list = field(default_factory=list)


def keys(text):
    """One key for each letter; equal beginnings have equal keys."""
    return tuple(text[: end + 1].encode() for end in range(len(text)))


def admitted(pool, text, num_tokens):
    holder = Holder(keys(text))
    assert pool.admit(holder, num_tokens, 0)
    pool.publish(holder, num_tokens)
    return holder


def test_equal_beginnings_share_blocks():
    pool = BlockModel(20, 4, span=8)
    one = admitted(pool, "ab", 17)
    assert pool.num_cached_tokens(keys("ac"), 17) == 8
    other = admitted(pool, "ac", 17)
    assert one.spans[0] is other.spans[0]
    assert pool.num_free == 20 - 5 - 3


def test_the_last_token_is_always_computed():
    pool = BlockModel(20, 4, span=8)
    admitted(pool, "ab", 16)
    assert pool.num_cached_tokens(keys("ab"), 16) == 8
    assert pool.num_cached_tokens(keys("ab"), 17) == 16


def test_idle_spans_stay_until_blocks_are_needed_and_the_oldest_goes_first():
    pool = BlockModel(6, 4, span=8)
    for text in ("a", "b"):
        pool.free(admitted(pool, text, 9))
    assert (pool.num_free, pool.num_cached, pool.num_available) == (2, 4, 6)
    admitted(pool, "", 16)
    assert not pool.has(b"a")
    assert pool.has(b"b")
    assert pool.dropped == [b"a"]
    assert pool.num_evicted == 2


def test_the_end_of_a_prompt_is_evicted_before_its_beginning():
    pool = BlockModel(4, 4, span=8)
    pool.free(admitted(pool, "ab", 16))
    admitted(pool, "", 5)
    assert pool.keys == [b"a"]


def test_two_that_compute_the_same_keep_it_once():
    pool = BlockModel(10, 4, span=8)
    one, other = Holder(keys("a")), Holder(keys("a"))
    assert pool.admit(one, 8, 0)
    assert pool.admit(other, 8, 0)
    pool.publish(one, 8)
    pool.publish(other, 8)
    assert pool.num_free == 8


def test_a_span_must_be_whole_blocks():
    with pytest.raises(ValueError, match="a span of 10 tokens is no multiple of 4"):
        BlockModel(10, 4, span=10)


STEPS = st.lists(
    st.tuples(st.sampled_from(["admit", "grow", "publish", "free"]), st.integers(0, 5)),
    max_size=60,
)
TEXTS = ("", "a", "ab", "abc", "ad", "xyz")


@given(STEPS)
def test_blocks_are_free_idle_or_used(steps):
    pool, holders = BlockModel(12, 4, span=8), {}
    for what, number in steps:
        if what == "admit" and number not in holders:
            holder = Holder(keys(TEXTS[number]))
            if pool.admit(holder, 8 * len(holder.keys) + 3, 0):
                holders[number] = holder
        elif number in holders:
            holder = holders[number]
            if what == "publish":
                pool.publish(holder, 8 * len(holder.keys))
            elif what == "grow" and pool.num_available:
                pool.grow(holder, (holder.num_blocks + 1) * 4)
            elif what == "free":
                pool.free(holders.pop(number))
        shared = {span: None for one in holders.values() for span in one.spans}
        own = sum(one.num_blocks - 2 * len(one.spans) for one in holders.values())
        assert pool.num_free + pool.num_cached + 2 * len(shared) + own == 12
        assert all(span.num_users for span in shared)


def test_reservations_are_granted_in_order_and_a_starved_sequence_goes_first():
    pool = BlockModel(4, 4)
    kept = KeptBlocks(pool)
    kept.reserve(("a", 0), 5, 12)
    kept.reserve(("b", 0), 6, 4)
    kept.grant(starved=4, num_spare=0)
    assert kept.granted == []
    kept.grant(starved=None, num_spare=0)
    assert kept.granted == [("a", 0), ("b", 0)]
    kept.release(("a", 0))
    assert pool.num_available == 3
    kept.release(("unknown", 0))


def model(num_blocks=100):
    return EngineModel(StepCost(1.0, 0.0), Limits(8, 512), num_blocks=num_blocks, block_size=4)


def run(engine):
    progress = []
    while engine.next_at < float("inf"):
        progress += engine.advance(engine.next_at)
    return progress


def test_a_prefill_holds_its_blocks_until_they_are_released():
    engine = model()
    engine.submit(("r", 0), 0.0, num_prompt=10, num_output=1, holds=True)
    assert [one.end for one in run(engine)] == ["length"]
    assert engine.load.num_leased_blocks == 3
    engine.release(("r", 0), 2.0)
    assert engine.load.num_leased_blocks == 0


def test_a_cancelled_prefill_holds_nothing():
    engine = model()
    engine.submit(("r", 0), 0.0, num_prompt=10, num_output=1, holds=True)
    engine.cancel(("r", 0), 0.0)
    run(engine)
    assert engine.load.num_leased_blocks == 0


def test_a_sequence_adopts_the_blocks_that_were_reserved_for_it():
    engine = model()
    engine.reserve(("r", 0), 0.0, num_tokens=10)
    assert engine.kept.granted == [("r", 0)]
    engine.submit(("r", 0), 5.0, num_prompt=10, num_output=3, num_emitted=1)
    first, last = run(engine)
    assert (first.at_s, last.at_s) == (6.0, 7.0)  # nothing of the prompt is computed again
    assert engine.load.num_leased_blocks == 0


def test_a_reservation_waits_for_blocks():
    engine = model(num_blocks=6)
    engine.submit(("r", 0), 0.0, num_prompt=16, num_output=4)
    engine.reserve(("s", 0), 0.5, num_tokens=16)
    assert engine.kept.granted == []
    run(engine)
    assert engine.kept.granted == [("s", 0)]


def test_a_sequence_waits_for_blocks_that_are_kept():
    engine = model(num_blocks=6)
    engine.reserve(("s", 0), 0.0, num_tokens=16)
    engine.submit(("t", 0), 1.0, num_prompt=12, num_output=1)
    assert run(engine) == []
    engine.release(("s", 0), 9.0)
    assert [one.at_s for one in run(engine)] == [10.0]


def test_a_new_sequence_leaves_a_hundredth_of_the_pool_to_those_that_run():
    engine = model(num_blocks=200)
    engine.submit(("r", 0), 0.0, num_prompt=3, num_output=3)  # one block, then two
    engine.submit(("s", 0), 0.5, num_prompt=4 * 198 - 1, num_output=1)
    engine.submit(("alone", 0), 9.0, num_prompt=4 * 200 - 1, num_output=1)
    # `s` fits beside `r` with one block to spare, and two are wanted: it begins after `r`.
    begun_s = {one.key[0]: one.begun_s for one in run(engine)}
    assert begun_s == {"r": 0.0, "s": 3.0, "alone": 9.0}


def test_a_later_sequence_does_not_overtake_a_reservation_that_waits():
    engine = model(num_blocks=6)
    engine.submit(("r", 0), 0.0, num_prompt=14, num_output=3)
    engine.reserve(("s", 0), 0.5, num_tokens=20)
    engine.submit(("t", 0), 1.0, num_prompt=8, num_output=1)  # its two blocks are free
    assert {one.key[0] for one in run(engine)} == {"r"}
    assert engine.kept.granted == [("s", 0)]
    engine.release(("s", 0), 9.0)
    assert [(one.key[0], one.at_s) for one in run(engine)] == [("t", 10.0)]


def test_a_reservation_in_the_middle_of_a_run_leaves_the_run_its_blocks():
    engine = model(num_blocks=12)
    engine.submit(("r", 0), 0.0, num_prompt=4, num_output=36)
    for at_s in (0.0, 1.0, 20.5, 24.5):  # the sequence has taken ever more blocks by then
        engine.advance(at_s)
    engine.reserve(("s", 0), 24.6, num_tokens=16)
    run(engine)
    engine.release(("s", 0), 90.0)
    run(engine)
    assert engine.load.num_leased_blocks == 0


CALLS = st.lists(
    st.tuples(st.sampled_from(["submit", "reserve", "release", "cancel"]), st.integers(0, 6)),
    max_size=40,
)


@given(CALLS, st.integers(8, 30))
def test_no_calls_lose_a_block_or_take_one_too_many(calls, num_blocks):
    engine, now, begun = model(num_blocks=num_blocks), 0.0, set()
    for what, number in calls:
        now += 1.7
        key = (f"r{number}", 0)
        engine.advance(now)
        if what == "submit" and key not in begun:
            begun.add(key)
            engine.submit(key, now, num_prompt=3 + number, num_output=12, holds=number == 1)
        elif what == "reserve" and key not in begun and not engine.kept.has(key):
            engine.reserve(key, now, num_tokens=3 + number)
        elif what == "release":
            engine.release(key, now)
        elif what == "cancel":
            engine.cancel(key, now)
        assert 0 <= engine.blocks.num_free <= num_blocks
    for later_s in (0.0, 1e6, 2e6):
        for number in range(7):
            engine.release((f"r{number}", 0), now + later_s)
        run(engine)
    assert engine.load.num_leased_blocks == 0


def gap_seconds(engine):
    return sum(value_of(bucket) * count for bucket, count in engine.gaps.items())


def test_gaps_between_tokens_include_the_wait_of_a_preempted_sequence():
    engine, times = model(num_blocks=12), {}
    for name in "ab":
        engine.submit((name, 0), 0.0, num_prompt=16, num_output=20)
    for one in run(engine):
        times.setdefault(one.key, []).append(one.at_s)
    assert engine.num_preemptions > 0
    waited_s = sum(each[-1] - each[0] for each in times.values())
    assert gap_seconds(engine) == pytest.approx(waited_s, rel=0.02)


def test_an_engine_that_died_keeps_its_counters():
    engine = model(num_blocks=12)
    for name in "ab":
        engine.submit((name, 0), 0.0, num_prompt=16, num_output=20)
    run(engine)
    before, after = engine.load, engine.emptied(99.0).load
    assert after.num_preemptions == before.num_preemptions > 0
    assert after.peak_leased_blocks == before.peak_leased_blocks > 0
    assert after.num_leased_blocks == 0
