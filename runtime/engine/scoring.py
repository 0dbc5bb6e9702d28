"""How likely a prompt's own tokens were, from the logits of the tokens before them."""

from collections.abc import Sequence as Items

import torch

from sagellm.runtime.engine.batch import Scoring
from sagellm.runtime.messages import TokenLogprob


def score(logits: torch.Tensor, scoring: Items[Scoring]) -> list[list[TokenLogprob]]:
    """Logprobs of each prompt's positions; `logits` [R, vocab] has their rows in that order."""
    found, start = [], 0
    for sequence, positions in scoring:
        rows = logits[start : start + len(positions)]
        token_ids = [sequence.tokens[position] for position in positions]
        found.append(_scored(rows, token_ids, sequence.state.sampling.prompt_logprobs or 0))
        start += len(positions)
    return found


def _scored(logits: torch.Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprob]:
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids).unsqueeze(1)).squeeze(1)
    ranks = (logprobs > chosen.unsqueeze(1)).sum(dim=-1) + 1
    values, ids = logprobs.topk(min(num_top, logits.shape[1]), dim=-1)
    tops = zip(ids.tolist(), values.tolist(), strict=True)
    rows = zip(token_ids, chosen.tolist(), tops, ranks.tolist(), strict=True)
    return [
        TokenLogprob(token_id, logprob, tuple(zip(*top, strict=True)), rank)
        for token_id, logprob, top, rank in rows
    ]
