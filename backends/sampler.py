"""Samples tokens from logits: penalties, filters, and randomness that batching cannot change."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch

from sagellm.backends.step import LogitsRow, Logprob, Sampled, SamplingParams, Scored
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

_GREEDY_BELOW = 1e-5  # dividing by a smaller temperature overflows; as vLLM
_NEVER = float("-inf")
_NUCLEUS = 256  # top-p first sorts this many of the most likely tokens; rarely it needs more


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, choice, position) alone: 53 bits of BLAKE2b."""
    key = f"{seed}/{choice}/{position}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(
    logits: torch.Tensor,
    rows: Sequence[LogitsRow],
    masks: TokenMasks | None = None,
    largest: LargestAllowed = largest_allowed,
) -> Sampled:
    """Sample one token for each row of `logits` [R, vocab] float32.

    Each operation treats one row at a time or all rows alike, so that a row's token does not
    depend on the other rows. Rows whose largest logit is not finite are `broken`; their token is
    sampled as if all logits were zero. `masks`: of the rows that follow a grammar; None: they are
    computed here. `largest`: a faster function for the same result.
    """
    if not rows:
        return Sampled([])
    masks = masks or token_masks(rows)
    token_ids = _largest(logits)
    is_finite = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1).isfinite()
    broken: frozenset[int] = frozenset()
    if not bool(is_finite.all()):
        broken = frozenset((~is_finite).nonzero().flatten().tolist())
        logits = logits.where(is_finite.unsqueeze(1), 0.0)
    bits = {} if masks is None else dict(zip(masks.rows, masks.bits, strict=True))
    special = [index for index, row in enumerate(rows) if not _is_greedy(row)]
    greedy = bits.keys() - special
    bound = {index: mask for index, mask in bits.items() if index in greedy}
    none_left = _sample_bound(logits, token_ids, bound, largest)
    if special:
        none_left += _sample_processed(logits, rows, token_ids, bits, special)
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
    logits: torch.Tensor, token_ids: torch.Tensor, bound: Bits, largest: LargestAllowed
) -> list[int]:
    """Sample the greedy rows `bound`, from `token_ids`, the largest logits of all rows. Returns the
    rows whose grammar allows no token.

    The model's own choice is most often allowed; then its row of logits is not read again.
    """
    none_left = []
    scores = logits.cpu().numpy() if bound else None
    for index, mask in bound.items():
        token_id = int(token_ids[index])
        if mask[token_id // 32] >> token_id % 32 & 1:
            continue
        assert scores is not None
        best = largest(scores[index], mask)
        if best is None:
            none_left.append(index)
        else:
            token_ids[index] = best
    return none_left


def _largest(logits: torch.Tensor) -> torch.Tensor:
    """The index of the largest logit of each row, or of its first NaN: [R] int64."""
    if logits.device.type == "cpu":  # numpy's search is vectorised; torch's takes ten times as long
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def _is_greedy(row: LogitsRow) -> bool:
    """Whether the row takes the largest logit that its grammar allows: without temperature, and
    without mask, bias and penalty of the sampling options.
    """
    sampling = row.sampling
    return sampling.temperature < _GREEDY_BELOW and not (
        sampling.logit_bias or _is_masked(row) or _has_penalty(sampling)
    )


def _is_masked(row: LogitsRow) -> bool:
    sampling = row.sampling
    is_short = row.num_output < sampling.min_tokens
    return is_short or bool(sampling.allowed_token_ids or sampling.bad_words_token_ids)


def _has_penalty(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
    )


def _sample_processed(
    logits: torch.Tensor,
    rows: Sequence[LogitsRow],
    token_ids: torch.Tensor,
    bits: Bits,
    special: Sequence[int],
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
            if float(row_scores.amax()) == _NEVER:
                none_left.append(index)
                row_scores.fill_(0.0)  # any token will do: the row is reported as exhausted
        _bias(row_scores, row.sampling)
        if _has_penalty(row.sampling):
            _penalise(row_scores, row)
    found = _largest(scores)
    warm = [at for at, row in enumerate(chosen) if row.sampling.temperature >= _GREEDY_BELOW]
    if warm:
        found[warm] = _sample_random(scores[warm], [chosen[at] for at in warm])
    token_ids[special] = found
    return none_left


def _mask(logits: torch.Tensor, row: LogitsRow, mask: Mask | None) -> None:
    """Set the logits of forbidden tokens to -inf. Forbidden are tokens that are not allowed, that
    complete a bad word, that end the output before `min_tokens`, or that leave the row's grammar.
    """
    sampling = row.sampling
    if mask is not None:
        logits.masked_fill_(~torch.from_numpy(allowed_tokens(mask, len(logits))), _NEVER)
    if sampling.allowed_token_ids:
        allowed = torch.frombuffer(row.answer.allowed_ids, dtype=torch.int64)
        scores = logits[allowed]
        logits.fill_(_NEVER)
        logits[allowed] = scores
    if sampling.bad_words_token_ids:
        banned = banned_tokens(sampling.bad_words_token_ids, row.output)
        logits[torch.tensor(banned, dtype=torch.long)] = _NEVER
    if row.num_output < sampling.min_tokens and row.answer.stop_ids:
        logits[torch.tensor(sorted(row.answer.stop_ids))] = _NEVER


def banned_tokens(sequences: Sequence[Sequence[int]], output: Sequence[int]) -> list[int]:
    """The last token of each bad word, if the output ends with the other tokens of the word.

    As in vLLM, the prompt does not count: a bad word that begins in the prompt bans nothing.
    """
    return [
        sequence[-1]
        for sequence in sequences
        if tuple(output[max(0, len(output) + 1 - len(sequence)) :]) == tuple(sequence[:-1])
    ]


def _bias(logits: torch.Tensor, sampling: SamplingParams) -> None:
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias))
        logits[ids] += torch.tensor(list(sampling.logit_bias.values()))


def _penalise(logits: torch.Tensor, row: LogitsRow) -> None:
    """Apply the penalties. Repetition (CTRL, arXiv:1909.05858) counts prompt and output tokens;
    presence and frequency count output tokens only.
    """
    sampling = row.sampling
    seen = torch.tensor(sorted(set(row.tokens)))
    scores = logits[seen]
    factor = sampling.repetition_penalty
    # A factor above 1 must make negative scores smaller too.
    logits[seen] = torch.where(scores > 0, scores / factor, scores * factor)
    counts = Counter(row.output)
    if counts:
        times = torch.tensor(list(counts.values()))
        penalty = sampling.presence_penalty + sampling.frequency_penalty * times
        logits[torch.tensor(list(counts))] -= penalty


def _sample_random(logits: torch.Tensor, rows: Sequence[LogitsRow]) -> torch.Tensor:
    """Sample a token for each row: invert its cumulative distribution at one uniform number."""
    samplings = [row.sampling for row in rows]
    logits = logits / _column([sampling.temperature for sampling in samplings])
    _keep_min_p(logits, samplings)
    _keep_top_k(logits, samplings)
    _keep_top_p(logits, samplings)
    # In float64, rounding moves no boundary by more than the last bits of the logits do.
    cumulated = logits.double().softmax(dim=-1).cumsum(dim=-1)
    numbers = [uniform(row.sampling.seed or 0, row.answer.choice, row.num_output) for row in rows]
    # The last sum may differ from 1 in its last bits, so the number is scaled to it.
    aims = torch.tensor(numbers, dtype=torch.float64).unsqueeze(1) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, aims, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def _keep_min_p(logits: torch.Tensor, samplings: Sequence[SamplingParams]) -> None:
    """Drop tokens whose probability is below `min_p` times the largest one (arXiv:2407.01082)."""
    if any(sampling.min_p for sampling in samplings):
        floors = _column([sampling.min_p for sampling in samplings]).log()
        logits.masked_fill_(logits < logits.amax(dim=-1, keepdim=True) + floors, _NEVER)


def _keep_top_k(logits: torch.Tensor, samplings: Sequence[SamplingParams]) -> None:
    """Keep the k most likely tokens, and tokens as likely as the k-th. A k of 0 keeps all."""
    counts = [sampling.top_k for sampling in samplings]
    most = max((count for count in counts if count < logits.shape[1]), default=0)
    if most:
        best = logits.topk(most, dim=-1).values
        last = [count - 1 if 0 < count <= most else 0 for count in counts]
        least = best.gather(1, torch.tensor(last).unsqueeze(1))
        # Rows without a top-k keep every token.
        least[[index for index, count in enumerate(counts) if not 0 < count <= most]] = _NEVER
        logits.masked_fill_(logits < least, _NEVER)


def _keep_top_p(logits: torch.Tensor, samplings: Sequence[SamplingParams]) -> None:
    """Keep the fewest most likely tokens whose probabilities reach `top_p` (arXiv:1904.09751).

    Few tokens reach `top_p` in most rows, so only the _NUCLEUS most likely ones are sorted. If they
    do not reach it, the whole row is sorted. Probabilities are normalised over the whole row in
    both cases, so that both keep the same tokens.
    """
    chosen = [index for index, sampling in enumerate(samplings) if sampling.top_p < 1]
    if not chosen:
        return
    rows = logits[chosen]
    shares = _column([samplings[index].top_p for index in chosen])
    totals = rows.logsumexp(dim=-1, keepdim=True)
    least, is_enough = _least_kept(rows, totals, shares, min(_NUCLEUS, rows.shape[1]))
    rest = (~is_enough).nonzero().flatten()
    if len(rest):
        whole, _ = _least_kept(rows[rest], totals[rest], shares[rest], rows.shape[1])
        least[rest] = whole
    logits[chosen] = rows.masked_fill(rows < least, _NEVER)


def _least_kept(
    rows: torch.Tensor, totals: torch.Tensor, shares: torch.Tensor, num_best: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top-p cut-off of each row: the smallest logit to keep [R, 1], and its validity [R].

    Only the `num_best` largest logits of a row are searched. The cut-off is invalid if their
    probabilities sum to less than the row's top-p (`shares` [R, 1]). `totals` [R, 1]: logsumexp.
    """
    best = rows.topk(num_best, dim=-1).values
    cumulated = (best - totals).exp().cumsum(dim=-1)
    before = cumulated.roll(1, dims=-1)
    before[:, 0] = 0
    num_kept = (before < shares).sum(dim=-1, keepdim=True).clamp(min=1)
    is_enough = (cumulated[:, -1:] >= shares).squeeze(1)
    return best.gather(1, num_kept - 1), is_enough


def _column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).unsqueeze(1)


def _logprobs(
    logits: torch.Tensor, rows: Sequence[LogitsRow], token_ids: list[int]
) -> list[Logprob | None]:
    """Logprobs of the model's own distribution, before any processing, as vLLM does by default."""
    found: list[Logprob | None] = []
    for row, scores, token_id in zip(rows, logits, token_ids, strict=True):
        count = row.sampling.logprobs
        if count is None:
            found.append(None)
            continue
        logprobs = scores.log_softmax(dim=-1)
        values, ids = logprobs.topk(min(count, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        found.append(Logprob(token_id, float(logprobs[token_id]), top))
    return found


def score(logits: torch.Tensor, scored: Sequence[Scored]) -> list[list[Logprob]]:
    """Logprobs of the prompt tokens of each entry of `scored`.

    `logits` [R, vocab]: one row per prompt token, in the order of `scored`.
    """
    found, start = [], 0
    for token_ids, num_top in scored:
        found.append(_scored(logits[start : start + len(token_ids)], token_ids, num_top))
        start += len(token_ids)
    return found


def _scored(logits: torch.Tensor, token_ids: list[int], num_top: int) -> list[Logprob]:
    """The logprob and rank of each token; row i of `logits` predicts `token_ids[i]`."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids).unsqueeze(1)).squeeze(1)
    ranks = (logprobs > chosen.unsqueeze(1)).sum(dim=-1) + 1
    values, ids = logprobs.topk(min(num_top, logits.shape[1]), dim=-1)
    tops = zip(ids.tolist(), values.tolist(), strict=True)
    rows = zip(token_ids, chosen.tolist(), tops, ranks.tolist(), strict=True)
    return [
        Logprob(token_id, logprob, tuple(zip(*top, strict=True)), rank)
        for token_id, logprob, top, rank in rows
    ]
