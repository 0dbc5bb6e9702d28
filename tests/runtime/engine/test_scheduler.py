"""Which sequences compute when: budgets, fairness, admission, preemption, reservations."""

import zlib

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sagellm.runtime.engine.batch import Reservation
from sagellm.runtime.engine.options import Limits
from sagellm.runtime.engine.output import MAX_BATCHES, Mailbox
from sagellm.runtime.engine.scheduler import Scheduler
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.kv.lease import Fence
from sagellm.runtime.kv.pool import BlockPool
from sagellm.runtime.lease_shape import LeaseShape, TokenGroup
from sagellm.runtime.messages import SequenceState, TokenEvent


class Bench:
    """A scheduler, with the work that an engine does between steps."""

    def __init__(
        self, num_blocks=64, max_num_seqs=8, budget=64, chunk=None, is_kept=True, shape=None
    ):
        self.pool = BlockPool(num_blocks, 4, keeps_prefixes=is_kept, shape=shape)
        self.scheduler = Scheduler(self.pool, Limits(max_num_seqs, budget, chunk))
        self.mailbox = Mailbox(lambda: None)
        self.arrivals = 0

    def add(self, num_prompt, *, request_id=None, choice=0, priority=2):
        """A prompt that shares blocks only with prompts of the same request id."""
        self.arrivals += 1
        request_id = request_id or str(self.arrivals)
        state = SequenceState(
            owner="o",
            request_id=request_id,
            choice=choice,
            prompt_token_ids=(zlib.crc32(request_id.encode()),) * num_prompt,
            priority=priority,
        )
        sequence = Sequence(
            state,
            arrival=self.arrivals,
            mailbox=self.mailbox,
            max_output=100,
            stop_ids=frozenset(),
            output_text=None,
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self):
        """Schedule and compute: sequence -> tokens computed."""
        batch = self.scheduler.schedule()
        assert batch.num_tokens <= self.scheduler.limits.max_num_batched_tokens
        for sequence, query_len in zip(batch.sequences, batch.query_lens, strict=True):
            sequence.num_computed += query_len
            assert sequence.num_computed <= sequence.lease.capacity
            self.scheduler.reuse.publish(sequence)
            self.pool.free_unread(sequence.lease, sequence.num_computed)
        for sequence in batch.sampling:
            assert sequence.num_pending == 0
            sequence.tokens.append(1)
        self.pool.check()
        return dict(zip(batch.sequences, batch.query_lens, strict=True))

    def finish(self, sequence):
        self.scheduler.remove(sequence)
        if sequence.lease is not None:
            self.pool.advance(sequence.lease, "finish")


def test_nothing_to_do_is_an_empty_batch():
    assert Bench().step() == {}


def test_a_prompt_is_computed_in_chunks_of_the_budget():
    bench = Bench(budget=7)
    sequence = bench.add(17)
    assert [bench.step()[sequence] for _ in range(4)] == [7, 7, 3, 1]


def test_a_chunk_is_capped():
    bench = Bench(budget=64, chunk=5)
    sequence = bench.add(17)
    assert bench.step()[sequence] == 5


def test_decodes_come_before_prefills():
    bench = Bench(budget=8)
    decoding = bench.add(4)
    bench.step()
    prompt = bench.add(40)
    assert bench.step() == {decoding: 1, prompt: 7}


def test_a_short_prompt_overtakes_a_long_one():
    bench = Bench(num_blocks=256, budget=64)
    long = bench.add(700)
    bench.step()
    short = bench.add(4)
    assert bench.step() == {short: 4}
    assert short.num_output == 1
    assert bench.step() == {short: 1, long: 63}


def test_a_long_prompt_sits_out_never_twice_running():
    bench = Bench(num_blocks=256, budget=64)
    long = bench.add(700)
    bench.step()
    took_part = []
    for _ in range(6):
        bench.add(4)
        took_part.append(long in bench.step())
    assert took_part == [False, True] * 3


def test_a_short_prompt_after_a_long_answer_starts_at_once():
    bench = Bench()
    decoding = bench.add(4)
    for _ in range(5):
        bench.step()
    short = bench.add(4)
    assert bench.step() == {decoding: 1, short: 4}


def test_the_first_in_rank_keeps_half_of_the_budget():
    bench = Bench(num_blocks=256, budget=64)
    first = bench.add(400)
    shorter = [bench.add(50) for _ in range(4)]
    batch = bench.step()
    assert batch[first] == 32
    assert sum(batch.get(sequence, 0) for sequence in shorter) == 32


def test_decodes_beyond_the_budget_take_turns():
    bench = Bench(budget=4)
    sequences = [bench.add(1) for _ in range(6)]
    for _ in range(30):
        bench.step()
    counts = [sequence.num_output for sequence in sequences]
    assert max(counts) - min(counts) <= 2


def test_decodes_leave_prefills_a_part():
    bench = Bench(budget=4)
    decodes = [bench.add(1) for _ in range(4)]
    bench.step()
    prompt = bench.add(3)
    batch = bench.step()
    assert batch[prompt] == 1
    assert sum(sequence in batch for sequence in decodes) == 3


def test_slots_bound_the_running():
    bench = Bench(max_num_seqs=2)
    first, second, third = (bench.add(4) for _ in range(3))
    assert set(bench.step()) == {first, second}
    bench.finish(first)
    assert set(bench.step()) == {second, third}


def test_priority_goes_first():
    bench = Bench(max_num_seqs=1)
    bench.add(4, priority=3)
    urgent = bench.add(4, priority=0)
    assert set(bench.step()) == {urgent}


@pytest.mark.parametrize(("is_kept", "num_computed_again"), [(True, 4), (False, 8)])
def test_the_last_in_rank_is_preempted_and_recomputed(is_kept, num_computed_again):
    bench = Bench(num_blocks=4, is_kept=is_kept)
    first, second = bench.add(8), bench.add(7)
    bench.step()
    bench.step()
    assert second.lease is None
    assert second.num_computed == 0
    assert second.num_output == 1
    assert bench.scheduler.num_preemptions == 1
    bench.finish(first)
    assert bench.step() == {second: num_computed_again}
    assert second.num_output == 2


def test_low_priority_is_preempted_before_late_arrival():
    bench = Bench(num_blocks=4)
    background, normal = bench.add(7, priority=4), bench.add(7)
    for _ in range(3):
        bench.step()
    assert background.lease is None
    assert normal.lease is not None


def test_a_prompt_waits_until_all_its_blocks_are_free():
    bench = Bench(num_blocks=4)
    first, second = bench.add(12), bench.add(8)
    assert set(bench.step()) == {first}
    assert second.lease is None
    bench.finish(first)
    assert set(bench.step()) == {second}


@pytest.mark.parametrize("is_kept", [True, False])
def test_choices_share_the_full_blocks_of_their_prompt(is_kept):
    bench = Bench(is_kept=is_kept)
    first = bench.add(10, request_id="r")
    second = bench.add(10, request_id="r", choice=1)
    assert set(bench.step()) == {first}  # the second waits: the prompt is being computed
    assert bench.step()[second] == 2
    assert second.lease.blocks[:2] == first.lease.blocks[:2]
    assert second.lease.blocks[2] != first.lease.blocks[2]


def test_a_choice_goes_on_alone_where_its_sibling_ends():
    bench = Bench(budget=4)
    first = bench.add(10, request_id="r")
    second = bench.add(10, request_id="r", choice=1)
    bench.step()
    bench.finish(first)
    assert bench.step()[second] == 4


def test_a_full_mailbox_stops_its_sequences():
    bench = Bench()
    bench.add(4)
    for _ in range(MAX_BATCHES):
        bench.mailbox.post(TokenEvent(request_id="x"))
        bench.mailbox.flush()
    assert bench.step() == {}


def reserve(bench, num_tokens):
    bench.arrivals += 1
    reservation = Reservation(Fence(f"l{bench.arrivals}", 0, 0), num_tokens, bench.arrivals)
    bench.scheduler.reserve(reservation)
    return reservation


async def test_reservations_are_served_in_order():
    bench = Bench(num_blocks=4)
    running = bench.add(12)
    bench.step()
    large, small = reserve(bench, 12), reserve(bench, 4)
    assert not large.granted.is_set()
    assert not small.granted.is_set()
    bench.finish(running)
    bench.step()
    assert large.granted.is_set()
    assert small.granted.is_set()


async def test_a_reservation_waits_for_an_older_sequence():
    bench = Bench(num_blocks=4)
    running = bench.add(12)
    bench.step()
    waiting = bench.add(12)
    bench.step()
    reservation = reserve(bench, 4)
    assert not reservation.granted.is_set()
    bench.finish(running)
    assert set(bench.step()) == {waiting}


async def test_a_sequence_waits_for_an_older_reservation():
    bench = Bench(num_blocks=4)
    running = bench.add(12)
    bench.step()
    reservation, waiting = reserve(bench, 12), bench.add(4)
    assert waiting not in bench.step()
    bench.finish(running)
    bench.step()
    assert reservation.granted.is_set()
    assert waiting in bench.step()


async def test_leaving_the_line_lets_the_next_in():
    bench = Bench(num_blocks=4)
    bench.add(12)
    bench.step()
    large, small = reserve(bench, 12), reserve(bench, 4)
    bench.scheduler.withdraw(large)
    assert small.granted.is_set()
    bench.scheduler.withdraw(small)
    assert bench.pool.num_free == 1


async def test_a_preempted_sequence_comes_before_a_younger_reservation():
    bench = Bench(num_blocks=4)
    first, second = bench.add(8), bench.add(7)
    bench.step()
    reservation = reserve(bench, 8)
    bench.step()
    assert second.lease is None
    assert not reservation.granted.is_set()
    bench.finish(first)
    assert second in bench.step()


@settings(max_examples=60)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=8),
    budget=st.integers(2, 40),
    max_num_seqs=st.integers(1, 5),
    num_blocks=st.integers(15, 30),
)
def test_every_sequence_ends(prompts, budget, max_num_seqs, num_blocks):
    """A pool that holds the longest sequence serves all sequences, with any preemptions."""
    bench = Bench(num_blocks, max_num_seqs, budget)
    unfinished = {bench.add(num_prompt): count for num_prompt, count in prompts}
    for _ in range(5000):
        if not unfinished:
            break
        bench.step()
        for sequence, count in list(unfinished.items()):
            if sequence.num_output >= count:
                bench.finish(sequence)
                del unfinished[sequence]
    assert not unfinished
    assert bench.pool.num_leased == 0


@settings(max_examples=60)
@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 2)), min_size=1, max_size=8
    ),
    budget=st.integers(2, 40),
    max_num_seqs=st.integers(1, 5),
    num_spare=st.integers(0, 12),
    windows=st.lists(st.integers(1, 30), max_size=2, unique=True),
    has_full=st.booleans(),
    num_state_blocks=st.integers(0, 3),
)
def test_every_sequence_of_any_groups_ends(
    prompts, budget, max_num_seqs, num_spare, windows, has_full, num_state_blocks
):
    """The smallest pool of a shape serves all sequences, even if they share prefixes."""
    groups = (*([TokenGroup()] * has_full), *(TokenGroup(2, window) for window in windows))
    assume(groups or num_state_blocks)
    shape = LeaseShape(4, groups, num_state_blocks, max_ahead=2 * budget)
    bench = Bench(shape.num_needed(60) + num_spare, max_num_seqs, budget, shape=shape)
    unfinished = {
        bench.add(num_prompt, request_id=str(alike), choice=number): count
        for number, (num_prompt, count, alike) in enumerate(prompts)
    }
    for _ in range(3000):
        if not unfinished:
            break
        bench.step()
        for sequence, count in list(unfinished.items()):
            if sequence.num_output >= count:
                bench.finish(sequence)
                del unfinished[sequence]
    assert not unfinished
    assert bench.pool.num_leased == 0


@pytest.mark.parametrize("depth", [0, 5])
def test_removing_a_waiting_sequence(depth):
    bench = Bench(max_num_seqs=1)
    sequences = [bench.add(4) for _ in range(7)]
    bench.step()
    bench.finish(sequences[depth])
    assert bench.scheduler.num_waiting + len(bench.scheduler.running) == 6
