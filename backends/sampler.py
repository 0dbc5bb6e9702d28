"""Samples tokens from logits: penalties, filters, and randomness that batching cannot change."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from sagellm.backends.arrays import Floats, Integers
from sagellm.backends.step import (
    GREEDY_BELOW,
    LogitsRow,
    Logprob,
    Sampled,
    SamplingParams,
    Scored,
    has_penalty,
)
from sagellm.backends.token_masks import (
    LargestAllowed,
    Mask,
    TokenMasks,
    allowed_tokens,
    cut_off,
    largest_allowed,
    token_masks,
)

Bits: TypeAlias = Mapping[int, Mask]  # a row that follows a grammar -> the bits of its mask
# Takes logits [R, vocab], which it may change, the options and a number in [0, 1) for each row;
# returns a token for each row.
SampleRandom: TypeAlias = Callable[[Floats, Sequence[SamplingParams], Sequence[float]], Integers]

_NEVER = np.float32(-np.inf)
_NUCLEUS = 256  # top-p first sorts this many of the most likely tokens; rarely it needs more


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, choice, position) alone: 53 bits of BLAKE2b."""
    key = f"{seed}/{choice}/{position}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample_random(
    logits: Floats, samplings: Sequence[SamplingParams], numbers: Sequence[float]
) -> Integers:
    """Sample a token for each row: invert its cumulative distribution at its number."""
    logits /= _column([sampling.temperature for sampling in samplings])
    _keep_min_p(logits, samplings)
    _keep_top_k(logits, samplings)
    _keep_top_p(logits, samplings)
    found = np.empty(len(logits), dtype=np.int64)
    for index, (scores, number) in enumerate(zip(logits, numbers, strict=True)):
        # In float64, rounding moves no boundary by more than the last bits of the logits do.
        cumulated = np.exp(scores.astype(np.float64) - scores.max()).cumsum()
        # The number is scaled to the sum of all, which lacks the norm that makes it 1.
        place = cumulated.searchsorted(number * cumulated[-1], side="right")
        found[index] = min(int(place), len(scores) - 1)
    return found


class Pickers(NamedTuple):
    """The functions that take most of the sampler's time."""

    largest: LargestAllowed = largest_allowed
    random: SampleRandom = sample_random


PICKERS = Pickers()


def sample_plain(logits: Floats, largest: Integers) -> Sampled | None:
    """Sample the index of the largest logit of each row; None if one of these logits is not finite.

    Between two steps little is in the CPU's cache, so no row is looked at.
    """
    best = logits[np.arange(len(largest)), largest]
    return Sampled(largest.tolist()) if np.isfinite(best).all() else None


def sample(
    logits: Floats,
    rows: Sequence[LogitsRow],
    masks: TokenMasks | None = None,
    pickers: Pickers = PICKERS,
    largest: Integers | None = None,
) -> Sampled:
    """Sample one token for each row of `logits` [R, vocab] float32.

    Each operation treats one row at a time or all rows alike, so that a row's token does not
    depend on the other rows. Rows whose largest logit is not finite are `broken`; their token is
    sampled as if all logits were zero. `masks`: of the rows that follow a grammar; None: they are
    computed here. `pickers`: faster functions for the same results. `largest`: the index of the
    largest logit of each row, as argmax finds it; None: it is found here.
    """
    if not rows:
        return Sampled([])
    token_ids: Integers = logits.argmax(axis=-1) if largest is None else largest.copy()
    is_finite = np.isfinite(logits[np.arange(len(rows)), token_ids])  # the first NaN counts
    masks = masks or token_masks(rows)
    broken: frozenset[int] = frozenset()
    if not is_finite.all():
        broken = frozenset((~is_finite).nonzero()[0].tolist())
        logits = np.where(is_finite[:, None], logits, np.float32(0))
    bits = {} if masks is None else dict(zip(masks.rows, masks.bits, strict=True))
    special = [index for index, row in enumerate(rows) if not _is_greedy(row)]
    greedy = bits.keys() - special
    bound = {index: mask for index, mask in bits.items() if index in greedy}
    none_left = _sample_bound(logits, token_ids, bound, pickers.largest)
    if special:
        none_left += _sample_processed(logits, rows, token_ids, bits, special, pickers.random)
    refused = {} if masks is None else dict(masks.refused)
    exhausted = frozenset(none_left).difference(broken, refused)
    refused |= cut_off(rows, exhausted)
    exhausted -= refused.keys()
    ids: list[int] = token_ids.tolist()
    logprobs = None
    if any(row.sampling.logprobs is not None for row in rows):
        logprobs = _logprobs(logits, rows, ids)
    return Sampled(ids, logprobs, broken.union(exhausted, refused), exhausted, refused)


def _sample_bound(
    logits: Floats, token_ids: Integers, bound: Bits, largest: LargestAllowed
) -> list[int]:
    """Sample the greedy rows `bound`, from `token_ids`, the largest logits of all rows. Returns the
    rows whose grammar allows no token.

    The model's own choice is most often allowed; then its row of logits is not read again.
    """
    none_left = []
    for index, mask in bound.items():
        token_id = int(token_ids[index])
        if mask[token_id // 32] >> token_id % 32 & 1:
            continue
        best = largest(logits[index], mask)
        if best is None:
            none_left.append(index)
        else:
            token_ids[index] = best
    return none_left


def _is_greedy(row: LogitsRow) -> bool:
    """Whether the row takes the largest logit that its grammar allows: without temperature, and
    without mask, bias and penalty of the sampling options.
    """
    sampling = row.sampling
    return sampling.temperature < GREEDY_BELOW and not (
        sampling.logit_bias or _is_masked(row) or has_penalty(sampling)
    )


def _is_masked(row: LogitsRow) -> bool:
    sampling = row.sampling
    is_short = row.num_output < sampling.min_tokens
    return is_short or bool(sampling.allowed_token_ids or sampling.bad_words_token_ids)


def _sample_processed(
    logits: Floats,
    rows: Sequence[LogitsRow],
    token_ids: Integers,
    bits: Bits,
    special: Sequence[int],
    random: SampleRandom,
) -> list[int]:
    """Sample the `special` rows into `token_ids`. Returns the rows whose masks forbid every token.

    The steps have vLLM's order: masks, bias, penalties, temperature, min_p, top_k, top_p.
    """
    none_left = []
    scores, chosen = logits[special], [rows[index] for index in special]  # a copy to change
    for row_scores, row, index in zip(scores, chosen, special, strict=True):
        mask = bits.get(index)
        if mask is not None or _is_masked(row):  # only a mask can forbid every token
            _mask(row_scores, row, mask)
            if _is_exhausted(row_scores):
                none_left.append(index)
                row_scores.fill(0.0)  # any token will do: the row is reported as exhausted
        _bias(row_scores, row.sampling)
        if has_penalty(row.sampling):
            _penalise(row_scores, row)
    found = np.empty(len(special), dtype=np.int64)
    warm = [at for at, row in enumerate(chosen) if row.sampling.temperature >= GREEDY_BELOW]
    if len(warm) < len(special):
        cold = [at for at in range(len(special)) if at not in set(warm)]
        found[cold] = scores[cold].argmax(axis=-1)
    if warm:
        drawn = [chosen[at] for at in warm]
        numbers = [uniform(r.sampling.seed or 0, r.answer.choice, r.num_output) for r in drawn]
        warm_scores = scores if len(warm) == len(special) else scores[warm]
        found[warm] = random(warm_scores, [row.sampling for row in drawn], numbers)
    token_ids[special] = found
    return none_left


def _is_exhausted(logits: Floats) -> bool:
    return bool(logits.max() == _NEVER)


def _mask(logits: Floats, row: LogitsRow, mask: Mask | None) -> None:
    """Set the logits of forbidden tokens to -inf. Forbidden are tokens that are not allowed, that
    complete a bad word, that end the output before `min_tokens`, or that leave the row's grammar.
    """
    sampling = row.sampling
    if mask is not None:
        logits[~allowed_tokens(mask, len(logits))] = _NEVER
    if sampling.allowed_token_ids:
        allowed = np.frombuffer(row.answer.allowed_ids, dtype=np.int64)
        scores = logits[allowed]
        logits.fill(_NEVER)
        logits[allowed] = scores
    if sampling.bad_words_token_ids:
        logits[banned_tokens(sampling.bad_words_token_ids, row.output)] = _NEVER
    if row.num_output < sampling.min_tokens and row.answer.stop_ids:
        logits[sorted(row.answer.stop_ids)] = _NEVER


def banned_tokens(sequences: Sequence[Sequence[int]], output: Sequence[int]) -> list[int]:
    """The last token of each bad word, if the output ends with the other tokens of the word.

    As in vLLM, the prompt does not count: a bad word that begins in the prompt bans nothing.
    """
    return [
        sequence[-1]
        for sequence in sequences
        if tuple(output[max(0, len(output) + 1 - len(sequence)) :]) == tuple(sequence[:-1])
    ]


def _bias(logits: Floats, sampling: SamplingParams) -> None:
    if sampling.logit_bias:
        logits[list(sampling.logit_bias)] += np.array(list(sampling.logit_bias.values()), "f4")


def _penalise(logits: Floats, row: LogitsRow) -> None:
    """Apply the penalties. Repetition (CTRL, arXiv:1909.05858) counts prompt and output tokens;
    presence and frequency count output tokens only.
    """
    sampling = row.sampling
    seen = list(set(row.tokens))
    scores = logits[seen]
    factor = np.float32(sampling.repetition_penalty)
    # A factor above 1 must make negative scores smaller too.
    logits[seen] = np.where(scores > 0, scores / factor, scores * factor)
    counts = Counter(row.output)
    if counts:
        times = np.array(list(counts.values()), dtype=np.float32)
        frequency = np.float32(sampling.frequency_penalty) * times
        logits[list(counts)] -= np.float32(sampling.presence_penalty) + frequency


def _keep_min_p(logits: Floats, samplings: Sequence[SamplingParams]) -> None:
    """Drop tokens whose probability is below `min_p` times the largest one (arXiv:2407.01082)."""
    for scores, sampling in zip(logits, samplings, strict=True):
        if sampling.min_p:
            scores[scores < scores.max() + np.log(np.float32(sampling.min_p))] = _NEVER


def _keep_top_k(logits: Floats, samplings: Sequence[SamplingParams]) -> None:
    """Keep the k most likely tokens, and tokens as likely as the k-th. A k of 0 keeps all."""
    for scores, sampling in zip(logits, samplings, strict=True):
        if 0 < sampling.top_k < len(scores):
            scores[scores < _best(scores, sampling.top_k)[-1]] = _NEVER


def _keep_top_p(logits: Floats, samplings: Sequence[SamplingParams]) -> None:
    """Keep the fewest most likely tokens whose probabilities reach `top_p` (arXiv:1904.09751).

    Few tokens reach `top_p` in most rows, so only the _NUCLEUS most likely ones are sorted. If they
    do not reach it, the whole row is sorted. Probabilities are normalised over the whole row in
    both cases, so that both keep the same tokens.
    """
    for scores, sampling in zip(logits, samplings, strict=True):
        if sampling.top_p >= 1:
            continue
        total = np.exp(scores - scores.max()).sum(dtype=np.float64)
        for num_best in (min(_NUCLEUS, len(scores)), len(scores)):
            best = _best(scores, num_best)
            cumulated = np.exp(best - best[0]).cumsum(dtype=np.float64)
            if cumulated[-1] >= sampling.top_p * total:
                break
        # The first token is kept always; another one if those before it do not reach top_p.
        num_kept = 1 + int(cumulated[:-1].searchsorted(sampling.top_p * total))
        scores[scores < best[num_kept - 1]] = _NEVER


def _best(scores: Floats, count: int) -> Floats:
    """The `count` largest scores, best first."""
    part = np.partition(scores, len(scores) - count)[len(scores) - count :]
    part.sort()
    return part[::-1]


def _column(values: list[float]) -> Floats:
    return np.array(values, dtype=np.float32)[:, None]


def _log_softmax(scores: Floats) -> Floats:
    shifted: Floats = scores - scores.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _top(logprobs: Floats, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely tokens of a row with their logprobs, best first."""
    count = min(count, len(logprobs))
    if not count:
        return ()
    ids = np.argpartition(logprobs, len(logprobs) - count)[len(logprobs) - count :]
    ids = ids[np.lexsort((ids, -logprobs[ids]))]
    return tuple(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))


def _logprobs(
    logits: Floats, rows: Sequence[LogitsRow], token_ids: list[int]
) -> list[Logprob | None]:
    """Logprobs of the model's own distribution, before any processing, as vLLM does by default."""
    found: list[Logprob | None] = []
    for row, scores, token_id in zip(rows, logits, token_ids, strict=True):
        count = row.sampling.logprobs
        if count is None:
            found.append(None)
            continue
        logprobs = _log_softmax(scores)
        found.append(Logprob(token_id, float(logprobs[token_id]), _top(logprobs, count)))
    return found


def score(logits: Floats, scored: Sequence[Scored]) -> list[list[Logprob]]:
    """Logprobs of the prompt tokens of each entry of `scored`.

    `logits` [R, vocab]: one row per prompt token, in the order of `scored`.
    """
    found, start = [], 0
    for token_ids, num_top in scored:
        part = logits[start : start + len(token_ids)]
        pairs = zip(part, token_ids, strict=True)
        found.append([_scored(scores, token_id, num_top) for scores, token_id in pairs])
        start += len(token_ids)
    return found


def _scored(scores: Floats, token_id: int, num_top: int) -> Logprob:
    """The logprob and rank of a token; `scores` are the logits of the row that predicts it."""
    logprobs = _log_softmax(scores)
    chosen = logprobs[token_id]
    rank = int((logprobs > chosen).sum()) + 1
    return Logprob(token_id, float(chosen), _top(logprobs, num_top), rank)
