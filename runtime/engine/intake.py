"""What an engine refuses to take, and why."""

import math

from sagellm.runtime.engine.port import EngineFacts, EngineRefusal, LeaseOffer
from sagellm.runtime.messages import Sampling, SequenceState

MAX_LOGPROBS = 100  # most likely tokens that one event may carry for each position


def check_sequence(state: SequenceState, *, vocab_size: int, max_model_len: int) -> None:
    """Raise EngineRefusal where the sequence could not be computed as it asks."""
    if state.task != "generate" or state.adapter or state.grammar:
        raise EngineRefusal("this engine generates text, without adapters and grammars")
    num_prompt = len(state.prompt_token_ids)
    if num_prompt == 0:
        raise EngineRefusal("the prompt is empty; give at least one token")
    if num_prompt >= max_model_len:
        raise EngineRefusal(
            f"the prompt has {num_prompt} tokens and the context limit is {max_model_len}; "
            f"shorten it to {max_model_len - 1}, or raise max_model_len"
        )
    num_known = num_prompt + len(state.emitted_token_ids)
    if state.lease is not None and state.lease.num_tokens >= num_known:
        raise EngineRefusal("the lease covers every known token; none is left to compute")
    _check_ids("the prompt", (*state.prompt_token_ids, *state.emitted_token_ids), vocab_size)
    check_sampling(state.sampling, vocab_size)


def check_offer(offer: LeaseOffer, facts: EngineFacts) -> None:
    """Raise EngineRefusal for blocks that this engine could not hold, or not read."""
    if offer.layout_hash != facts.layout_hash:
        raise EngineRefusal(
            "the sender keeps KV blocks of another layout; give both engines the same model, "
            "dtype and block_size"
        )
    room = facts.num_blocks * facts.block_size
    if offer.num_tokens > room:
        raise EngineRefusal(f"{offer.num_tokens} tokens of KV exceed the pool's {room}")


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """Raise EngineRefusal for a value outside its range; the message names it."""
    for name, is_right, wanted in (
        ("max_tokens", sampling.max_tokens >= 1, "at least 1"),
        ("min_tokens", 0 <= sampling.min_tokens <= sampling.max_tokens, "in 0 ... max_tokens"),
        ("temperature", 0 <= sampling.temperature < float("inf"), "at least 0"),
        ("top_k", sampling.top_k >= 0, "at least 0 (0 means all)"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("min_p", 0 <= sampling.min_p <= 1, "in 0 ... 1"),
        ("repetition_penalty", 0 < sampling.repetition_penalty < float("inf"), "above 0"),
        ("presence_penalty", abs(sampling.presence_penalty) <= 2, "in -2 ... 2"),
        ("frequency_penalty", abs(sampling.frequency_penalty) <= 2, "in -2 ... 2"),
        ("logprobs", 0 <= (sampling.logprobs or 0) <= MAX_LOGPROBS, f"in 0 ... {MAX_LOGPROBS}"),
        ("logit_bias", all(map(math.isfinite, sampling.logit_bias.values())), "finite"),
        ("stop", "" not in sampling.stop, "without empty strings"),
    ):
        if not is_right:
            raise EngineRefusal(f"{name} is {getattr(sampling, name)!r}; it must be {wanted}")
    _check_ids("logit_bias", tuple(sampling.logit_bias), vocab_size)
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)


def _check_ids(where: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise EngineRefusal(f"{where} has token {wrong}; the model knows 0 ... {vocab_size - 1}")
