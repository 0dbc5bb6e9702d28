"""How likely a prompt's own tokens were, from the logits of the tokens before them."""

from collections.abc import Sequence

import torch

from sagellm.backends.sampled import Logprob
from sagellm.backends.step import Scored


def score(logits: torch.Tensor, scored: Sequence[Scored]) -> list[list[Logprob]]:
    """Logprobs of the tokens of each; `logits` [R, vocab] has their rows in that order."""
    found, start = [], 0
    for token_ids, num_top in scored:
        found.append(_logprobs(logits[start : start + len(token_ids)], token_ids, num_top))
        start += len(token_ids)
    return found


def _logprobs(logits: torch.Tensor, token_ids: list[int], num_top: int) -> list[Logprob]:
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
