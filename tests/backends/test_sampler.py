"""The sampler: each option does what its name says, and rows do not depend on each other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampled_rows import LOGITS, floats, repeated, row, sample_one
from transformers.generation import NoBadWordsLogitsProcessor

from sagellm.backends import LogitsRow, sampler
from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.sampler import banned_tokens, sample, sample_plain, sample_random, uniform
from sagellm.runtime.sampling import Sampling

KERNELS = native_kernels()


def sampled_set(logits=LOGITS, count=300, **sampling):
    """The set of tokens that are sampled over many seeds."""
    rows = [row(**{"temperature": 1.0, **sampling, "seed": seed}) for seed in range(count)]
    return set(sample(repeated(count, logits), rows).token_ids)


def test_greedy_takes_the_largest():
    assert sample_one(row()) == 1


@pytest.mark.parametrize("wrong", [None, math.nan, math.inf, -math.inf])
def test_plain_rows_take_the_largest_if_it_is_finite(wrong):
    logits = repeated(3)
    if wrong is not None:
        logits[1] = wrong
    sampled = sample_plain(logits, logits.argmax(-1))
    assert (sampled and sampled.token_ids) == (None if wrong else [1, 1, 1])


@pytest.mark.parametrize(
    ("options", "is_plain"),
    [
        ({}, True),
        ({"min_p": 0.5, "top_k": 1, "top_p": 0.5}, True),  # of random tokens
        ({"temperature": 1.0}, False),
        ({"logit_bias": {1: 1.0}}, False),
        ({"min_tokens": 1}, False),
        ({"allowed_token_ids": (1,)}, False),
        ({"bad_words_token_ids": ((1,),)}, False),
        ({"logprobs": 0}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": 0.1}, False),
    ],
)
def test_options_that_may_change_a_greedy_token_or_ask_for_more_are_not_plain(options, is_plain):
    assert row(**options).answer.is_plain == is_plain


def test_no_rows_sample_nothing():
    assert sample(np.empty((0, 6), np.float32), []).token_ids == []


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.5, "logprobs": 2}])
def test_logits_that_are_no_numbers_break_their_own_row(wrong, sampling):
    logits = repeated(3)
    logits[1, 2] = wrong
    rows = [row(**sampling), row(**sampling), row(**sampling)]
    sampled = sample(logits, rows)
    assert sampled.broken == {1}
    whole = sample(repeated(3), rows)
    assert sampled.token_ids[::2] == whole.token_ids[::2]
    assert whole.broken == frozenset()


def test_the_input_is_not_changed():
    logits = repeated(2)
    sample(logits, [row(temperature=1.0, top_k=2), row(logit_bias={3: 50.0})])
    assert np.array_equal(logits, repeated(2))


def test_logit_bias_moves_the_largest():
    assert sample_one(row(logit_bias={3: 10.0})) == 3
    assert sample_one(row(logit_bias={1: -100.0})) == 4


def test_only_allowed_tokens_are_sampled():
    assert sample_one(row(allowed_token_ids=(0, 2, 3))) == 2
    assert sample_one(row(allowed_token_ids=(3,), logit_bias={1: 100.0})) == 3
    warm = {
        sample_one(row(allowed_token_ids=(2, 4), temperature=5.0, seed=seed)) for seed in range(40)
    }
    assert warm == {2, 4}


def test_a_word_of_one_token_is_never_sampled():
    assert sample_one(row(bad_words_token_ids=((1,),))) == 4
    assert sample_one(row(bad_words_token_ids=((1,), (4,)))) == 2


def test_a_word_is_not_completed_but_its_tokens_may_stand_elsewhere():
    banned = ((5, 4, 1),)
    assert sample_one(row(output=(5, 4), bad_words_token_ids=banned)) == 4
    assert sample_one(row(output=(4,), bad_words_token_ids=banned)) == 1
    assert sample_one(row(output=(5, 4, 2), bad_words_token_ids=banned)) == 1


def test_a_prompt_bans_nothing():
    """As in vLLM, only generated tokens count."""
    assert sample_one(row(prompt=(5,), output=(4,), bad_words_token_ids=((5, 4, 1),))) == 1


@pytest.mark.parametrize("seed", range(20))
def test_banned_tokens_are_those_of_transformers(seed):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randint(0, 3, (1, 9), generator=generator)
    lengths = torch.randint(1, 5, (12,), generator=generator).tolist()
    words = [torch.randint(0, 3, (n,), generator=generator).tolist() for n in lengths]
    scores = NoBadWordsLogitsProcessor(words, eos_token_id=99)(output, torch.zeros(1, 4))
    right = scores[0].isinf().nonzero().flatten().tolist()
    assert sorted(set(banned_tokens(words, output[0].tolist()))) == right


def test_allowed_tokens_are_read_once_a_sequence(monkeypatch):
    first = row(allowed_token_ids=(4, 5, 0))
    assert sample_one(first) == 4
    monkeypatch.setattr(sampler.np, "array", None)  # nothing is built from Python's numbers
    assert sample_one(first) == 4
    assert sample_one(LogitsRow(first.answer, 1, (4,))) == 4
    fed = LogitsRow(first.answer, 1, source=1)
    fed.feed([9, 4])
    assert (fed.tokens, fed.num_output) == ([0, 4], 1)
    assert sample_one(fed) == 4


def test_rows_without_a_mask_are_not_searched_for_a_token_that_is_left(monkeypatch):
    monkeypatch.setattr(sampler, "_is_exhausted", None)
    assert sample_one(row(temperature=1.0)) in range(6)
    assert sample_one(row(output=(1,), presence_penalty=0.2)) == 4
    assert sample_one(row(output=(1,), presence_penalty=0.2, min_tokens=1)) == 4


def test_min_tokens_mask_the_end():
    assert sample_one(row(output=(2,), min_tokens=2, stop_ids=(1, 4))) == 2
    assert sample_one(row(output=(2, 2), min_tokens=2, stop_ids=(1, 4))) == 1


def test_presence_penalty_counts_once_and_in_the_output_only():
    assert sample_one(row(output=(1,), presence_penalty=0.2)) == 4
    assert sample_one(row(prompt=(1,), presence_penalty=0.2)) == 1
    assert sample_one(row(output=(1, 1, 1), presence_penalty=0.05)) == 1


def test_frequency_penalty_counts_each():
    assert sample_one(row(output=(1,), frequency_penalty=0.06)) == 1
    assert sample_one(row(output=(1, 1), frequency_penalty=0.06)) == 4


def test_repetition_penalty_weighs_prompt_and_output():
    assert sample_one(row(prompt=(1,), repetition_penalty=1.2)) == 4
    assert sample_one(row(output=(1,), repetition_penalty=1.2)) == 4
    negative = floats(-1.0, -1.1)
    assert sample_one(row(prompt=(0,), repetition_penalty=1.2), negative) == 1


def test_temperature_zero_and_nearly_zero_are_greedy():
    assert sample_one(row(temperature=1e-6)) == 1


def test_top_k_keeps_k():
    assert sampled_set(top_k=1) == {1}
    assert sampled_set(top_k=2) == {1, 4}


def test_top_k_keeps_what_is_as_likely_as_the_last():
    assert sampled_set(floats(1.0, 1.0, 0.0), top_k=1) == {0, 1}


def test_top_p_keeps_the_smallest_set():
    probabilities = floats(0.5, 0.3, 0.15, 0.05)
    assert sampled_set(np.log(probabilities), top_p=0.79) == {0, 1}
    assert sampled_set(np.log(probabilities), top_p=0.81) == {0, 1, 2}
    assert sampled_set(np.log(probabilities), top_p=1e-9) == {0}


@pytest.mark.parametrize("share", [0.2, 0.7, 0.95, 0.999])
def test_top_p_is_the_same_however_many_tokens_it_keeps(share):
    logits = torch.randn(20, 3000, generator=torch.Generator().manual_seed(1))
    logits[::2] *= 4  # peaked, and nearly flat: a few tokens, and thousands
    kept = logits.clone()
    sampler._keep_top_p(kept.numpy(), [Sampling(top_p=share)] * 20)
    for scores, left in zip(logits, kept, strict=True):
        ordered = scores.double().softmax(0).sort(descending=True)
        right = int((ordered.values.cumsum(0) < share).sum()) + 1
        kept_ids = left.isfinite().nonzero().flatten().tolist()
        assert len(kept_ids) == pytest.approx(right, abs=1)  # a sum in float32 rounds
        assert set(kept_ids) == set(ordered.indices[: len(kept_ids)].tolist())


def test_min_p_is_relative_to_the_most_likely():
    probabilities = floats(0.5, 0.3, 0.15, 0.05)
    assert sampled_set(np.log(probabilities), min_p=0.5) == {0, 1}
    assert sampled_set(np.log(probabilities), min_p=0.2) == {0, 1, 2}


def test_filters_use_the_tempered_distribution():
    probabilities = floats(0.5, 0.3, 0.15, 0.05)
    assert sampled_set(np.log(probabilities), temperature=0.2, top_p=0.9) == {0}


def test_frequencies_follow_the_distribution():
    rows = [row(temperature=1.0, seed=seed) for seed in range(4000)]
    counts = torch.tensor(sample(repeated(4000), rows).token_ids).bincount(minlength=6)
    assert (counts / 4000 - torch.from_numpy(LOGITS).softmax(0)).abs().max() < 0.03


def test_uniform_depends_on_each_of_its_arguments():
    numbers = {uniform(*key) for key in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (-1, 0, 0)]}
    assert len(numbers) == 5
    assert all(0 <= number < 1 for number in numbers)
    assert uniform(7, 2, 9) == uniform(7, 2, 9)


def test_choices_of_one_request_differ():
    rows = [row(temperature=1.5, choice=choice) for choice in range(40)]
    assert len(set(sample(repeated(40), rows).token_ids)) > 2


SAMPLINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.3]),
        "top_k": st.sampled_from([0, 1, 3]),
        "top_p": st.sampled_from([0.3, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.2]),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
        "seed": st.integers(0, 99),
    }
)


@settings(max_examples=60)
@given(st.lists(SAMPLINGS, min_size=1, max_size=6), st.integers(0, 1000))
def test_a_row_does_not_see_its_neighbours(samplings, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(len(samplings), 50, generator=generator) * 3).numpy()
    rows = [row(output=(1, 2, 3), **sampling) for sampling in samplings]
    together = sample(logits, rows).token_ids
    assert together == [sample_one(one, scores) for one, scores in zip(rows, logits, strict=True)]


def test_logprobs_are_of_the_raw_distribution():
    rows = [row(logprobs=2, temperature=1.0, logit_bias={3: 100.0}), row()]
    sampled = sample(repeated(2), rows)
    first, second = sampled.logprobs
    right = torch.from_numpy(LOGITS).log_softmax(0)
    assert second is None
    assert first.token_id == 3
    assert first.logprob == pytest.approx(right[3].item())
    assert [token for token, _ in first.top] == [1, 4]
    assert first.top[0][1] == pytest.approx(right[1].item())


def test_logprobs_zero_gives_the_chosen_token_alone():
    assert sample(LOGITS[None], [row(logprobs=0)]).logprobs[0].top == ()


@pytest.mark.skipif(KERNELS is None, reason="no C compiler on this machine")
class TestSamplingInC:
    """The C sampler against the definition in numpy."""

    SAMPLINGS = (
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 2000},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"top_p": 1e-9},
        {"min_p": 0.05},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 40.0, "top_p": 0.99, "top_k": 2999},
    )

    @pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
    @pytest.mark.parametrize("size", [1, 7, 513, 3001])
    @pytest.mark.parametrize("spread", [0.0, 3.0, 200.0])
    def test_tokens_are_those_of_numpy(self, size, spread, sampling):
        generator = np.random.default_rng(size)
        logits = (generator.standard_normal((40, size)) * spread).astype(np.float32)
        logits[::3, : size // 2] = -np.inf  # forbidden
        samplings = [Sampling(**{"temperature": 1.0, **sampling})] * 40
        numbers = generator.random(40).tolist()
        numbers[:2] = [1e-9, 1 - 2**-53]
        found = KERNELS.sample_random(logits.copy(), samplings, numbers, 3)
        assert found.tolist() == sample_random(logits.copy(), samplings, numbers).tolist()

    def test_equal_logits_at_the_cut_are_all_kept(self):
        logits = np.zeros((600, 1000), np.float32)
        numbers = np.linspace(0, 1, 600, endpoint=False).tolist()
        for sampling in (Sampling(temperature=1.0, top_k=3), Sampling(temperature=1.0, top_p=0.1)):
            found = KERNELS.sample_random(logits.copy(), [sampling] * 600, numbers)
            assert found.tolist() == [int(number * 1000) for number in numbers]

    def test_threads_and_neighbours_change_no_token(self):
        logits = np.random.default_rng(1).standard_normal((9, 5000)).astype(np.float32)
        samplings = [Sampling(temperature=0.7, top_p=0.1 * row) for row in range(1, 10)]
        numbers = [0.11 * row for row in range(9)]
        alone = [
            KERNELS.sample_random(logits[[row]], samplings[row : row + 1], numbers[row : row + 1])
            for row in range(9)
        ]
        for threads in (1, 2, 5, 16):
            found = KERNELS.sample_random(logits.copy(), samplings, numbers, threads)
            assert found.tolist() == np.concatenate(alone).tolist()
