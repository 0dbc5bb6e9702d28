"""Masks of grammars: what the sampler may take, and the thread that computes them."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampled_rows import LOGITS, floats, repeated, row, sample_one

from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.cpu.program import CpuQueue, _Launch
from sagellm.backends.sampler import sample
from sagellm.backends.step import MatcherError, StepBatch
from sagellm.backends.token_masks import MaskThread, allowed_tokens, largest_allowed, token_masks

VOCAB = 6
KERNELS = native_kernels()


class Allowing:
    """Allows the same tokens after every output."""

    vocab_size = VOCAB

    def __init__(self, *token_ids):
        self.token_ids = list(token_ids)
        self.is_complete = True
        self.outputs = []
        self.threads = set()

    def fill(self, output, mask):
        self.outputs.append(list(output))
        self.threads.add(threading.current_thread().name)
        mask.view(np.uint8)[:] = 0
        for token_id in self.token_ids:
            mask[token_id // 32] |= np.int32(1 << token_id % 32)

    def may_end(self, output):
        return self.is_complete


class Exceeding:
    """Exceeds its limits at once."""

    vocab_size = VOCAB

    def fill(self, output, mask):
        raise MatcherError("too large")


def bound(*token_ids, **fields):
    found = row(**fields)
    found.answer.matcher = Allowing(*token_ids)
    return found


def test_greedy_takes_the_largest_that_is_allowed():
    assert sample_one(bound(0, 2, 5)) == 2
    assert sample_one(bound(1, 2)) == 1  # the largest of all


def test_equal_logits_give_the_first_allowed_token():
    logits = floats(3.0, 3.0, 3.0, 3.0, 3.0, 9.0)
    assert sample_one(bound(2, 4), logits) == 2


@pytest.mark.parametrize("sampling", [{"temperature": 1.5}, {"presence_penalty": 1.0}])
def test_other_options_choose_among_the_allowed_tokens(sampling):
    rows = [bound(3, 5, **{**sampling, "seed": seed}) for seed in range(60)]
    found = sample(repeated(60), rows).token_ids
    assert set(found) <= {3, 5}
    assert len(set(found)) == (2 if "temperature" in sampling else 1)


def test_masks_intersect():
    assert sample_one(bound(0, 2, 3, allowed_token_ids=(1, 3, 0))) == 0
    assert sample_one(bound(0, 3, bad_words_token_ids=((0,),))) == 3
    assert sample_one(bound(1, 3, min_tokens=2, stop_ids=[1])) == 3
    assert sample_one(bound(2, 3, logit_bias={3: 50.0})) == 3


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}])
def test_a_row_without_an_allowed_token_is_exhausted(sampling):
    sampled = sample(repeated(3), [row(), bound(**sampling), bound(4)])
    assert sampled.exhausted == sampled.broken == {1}
    assert sampled.token_ids[0] == 1
    assert sampled.token_ids[2] == 4


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}])
def test_a_row_without_a_token_before_the_end_of_its_grammar_is_refused(sampling):
    one = bound(**sampling)
    one.answer.matcher.is_complete = False
    sampled = sample(repeated(2), [one, bound()])
    assert "no token is left" in sampled.refused[0]
    assert sampled.broken == {0, 1}
    assert sampled.exhausted == {1}


def test_a_grammar_past_its_limits_refuses_its_row_alone():
    lost = row(temperature=1.0)
    lost.answer.matcher = Exceeding()
    sampled = sample(repeated(2), [lost, bound(4)])
    assert sampled.refused == {0: "too large"}
    assert sampled.broken == {0}
    assert sampled.exhausted == frozenset()
    assert sampled.token_ids[1] == 4


def test_broken_logits_are_reported_as_such():
    logits = np.stack((LOGITS, np.full(VOCAB, np.nan, np.float32)))
    sampled = sample(logits, [bound(4), bound()])
    assert sampled.broken == {1}
    assert sampled.exhausted == frozenset()


def test_logprobs_are_those_of_the_model():
    plain = sample(LOGITS[None], [row(logprobs=6)]).logprobs[0]
    found = sample(LOGITS[None], [bound(4, logprobs=6)]).logprobs[0]
    assert found.token_id == 4
    assert found.top == plain.top


@given(st.lists(st.integers(0, 99), unique=True), st.integers(100, 140))
def test_bits_are_read_lowest_first(token_ids, vocab_size):
    mask = np.zeros(-(-vocab_size // 32), dtype=np.int32)
    for token_id in token_ids:
        mask[token_id // 32] |= np.uint32(1 << token_id % 32).astype(np.int32)
    assert allowed_tokens(mask, vocab_size).nonzero()[0].tolist() == sorted(token_ids)


@given(st.lists(st.integers(0, 99), unique=True), st.integers(100, 140), st.integers(0, 9))
def test_the_largest_allowed_is_the_first_of_the_largest(token_ids, vocab_size, seed):
    mask = np.zeros(-(-vocab_size // 32) + 8, dtype=np.int32)
    for token_id in token_ids:
        mask[token_id // 32] |= np.uint32(1 << token_id % 32).astype(np.int32)
    scores = np.random.default_rng(seed).integers(-3, 3, vocab_size + 256).astype(np.float32)
    right = max(sorted(token_ids), key=lambda token_id: scores[token_id], default=None)
    assert largest_allowed(scores, mask) == right
    if KERNELS is not None:  # there is a C compiler
        assert KERNELS.largest_allowed(scores, mask) == right


@pytest.mark.parametrize("vocab_size", [40, 64])
def test_a_score_of_minus_infinity_is_never_taken(vocab_size):
    scores = np.full(vocab_size, -np.inf, np.float32)
    scores[[0, 35]] = 1.0, 0.5
    mask = np.array([2, 4], dtype=np.int32)  # tokens 1 and 34
    for largest in (largest_allowed, KERNELS.largest_allowed if KERNELS else largest_allowed):
        assert largest(scores, mask) is None
        assert largest(scores, mask | np.int32(8)) == 35
    logits = scores[None]
    for sampling in ({}, {"temperature": 1.0}):
        one = row(**sampling)
        one.answer.matcher = Allowing(1, 34)
        one.answer.matcher.vocab_size = vocab_size
        assert sample(logits, [one]).exhausted == {0}


def test_a_matcher_sees_the_output_with_its_drafts():
    one = bound(4, output=(2, 3), prompt=(1, 1, 1))
    one.added = (5,)
    token_masks([row(), one])
    assert one.answer.matcher.outputs == [[2, 3, 5]]


def test_the_thread_starts_with_the_first_grammar():
    masks = MaskThread()
    assert masks.start([row(), row()]).result() is None
    assert threads_of_grammars() == set()
    one = bound(4)
    found = masks.start([row(), one]).result()
    assert found.rows == [1]
    assert one.answer.matcher.threads == threads_of_grammars() != set()
    masks.close()
    assert threads_of_grammars() == set()


def test_no_matcher_works_past_a_step_whose_program_failed():
    may_fill = threading.Event()
    one = bound(4)
    fill = one.answer.matcher.fill

    def slow(output, mask):
        assert may_fill.wait(5)
        fill(output, mask)

    def run(inputs, pool, threads, new_logits):
        threading.Timer(0.02, may_fill.set).start()
        raise RuntimeError("broken")

    one.answer.matcher.fill = slow
    batch = StepBatch([], [], [], [], [0], rows=[one])
    program = SimpleNamespace(run=run, lock=threading.Lock())
    queue = CpuQueue(1, is_native=False)
    with pytest.raises(RuntimeError, match="broken"):
        queue._computed(_Launch(program, SimpleNamespace(pool=None), batch, None))
    assert one.answer.matcher.outputs  # the masks are complete
    queue.close()


def threads_of_grammars():
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if name.startswith("sagellm-grammar")}
