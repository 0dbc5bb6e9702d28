"""Checks of submitted sequences and of lease offers; the `Sequence` of a checked state."""

import math

from sagellm.runtime.engine.output import Mailbox
from sagellm.runtime.engine.runner import EngineResources
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.messages import SequenceState
from sagellm.runtime.port import EngineFacts, EngineRefusal, LeaseOffer
from sagellm.runtime.sampling import Sampling, sampling_fault

VERSION = 1  # of SequenceState


def open_sequence(
    state: SequenceState, resources: EngineResources, mailbox: Mailbox, *, arrival: int
) -> Sequence:
    """Create the sequence of a checked state. `arrival`: its number in order of submission."""
    sampling, num_prompt = state.sampling, len(state.prompt_token_ids)
    eos = frozenset() if sampling.ignore_eos else resources.eos_token_ids
    return Sequence(
        state,
        arrival=arrival,
        mailbox=mailbox,
        max_output=min(sampling.max_tokens, resources.facts.max_model_len - num_prompt),
        stop_ids=eos.union(sampling.stop_token_ids),
        output_text=resources.open_output_text(state) if resources.open_output_text else None,
    )


def check_sequence(state: SequenceState, *, vocab_size: int, max_model_len: int) -> None:
    """Raise EngineRefusal for a sequence that this engine cannot compute as requested."""
    if state.version != VERSION:
        raise EngineRefusal(
            f"the sequence has version {state.version}; this engine reads {VERSION}"
        )
    if state.task != "generate" or state.adapter:
        raise EngineRefusal("this engine generates text, without adapters")
    num_prompt = len(state.prompt_token_ids)
    if num_prompt == 0:
        raise EngineRefusal("the prompt is empty; give at least one token")
    if num_prompt >= max_model_len:
        raise EngineRefusal(
            f"the prompt has {num_prompt} tokens and the context limit is {max_model_len}; "
            f"shorten it to {max_model_len - 1}, or raise max_model_len"
        )
    # NaN has no place in the order of deadlines.
    if state.expires_s is not None and math.isnan(state.expires_s):
        raise EngineRefusal("expires_s is not a time")
    _check_ids("the prompt", (*state.prompt_token_ids, *state.emitted_token_ids), vocab_size)
    check_sampling(state.sampling, vocab_size)
    _check_lease(state)


def _check_lease(state: SequenceState) -> None:
    """Raise EngineRefusal if an adopted lease leaves no token to compute, or if logprobs of its
    tokens are wanted.
    """
    if state.lease is None:
        return
    if state.lease.num_tokens >= len(state.prompt_token_ids) + len(state.emitted_token_ids):
        raise EngineRefusal("the lease covers every known token; none is left to compute")
    if state.sampling.prompt_logprobs is not None and not state.emitted_token_ids:
        raise EngineRefusal("prompt_logprobs need the whole prompt computed here; give no lease")


def check_offer(offer: LeaseOffer, facts: EngineFacts) -> None:
    """Raise EngineRefusal if the offered blocks exceed the pool, or have another layout."""
    if offer.layout_hash != facts.layout_hash:
        raise EngineRefusal(
            "the sender keeps KV blocks of another layout; give both engines the same model, "
            "dtype and block_size",
            code="",
        )
    if offer.num_tokens < 1:
        raise EngineRefusal("the prompt is empty; give at least one token")
    wanted = facts.shape.num_blocks(offer.num_tokens, offer.num_tokens)
    if wanted > facts.num_blocks:
        raise EngineRefusal(
            f"{offer.num_tokens} tokens of KV take {wanted} blocks, which exceed the pool's "
            f"{facts.num_blocks}"
        )


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """Raise EngineRefusal for a sampling option outside its range. The message names the option."""
    fault = sampling_fault(sampling)
    if fault is not None:
        raise EngineRefusal(fault)
    _check_ids("logit_bias", tuple(sampling.logit_bias), vocab_size)
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_ids("allowed_token_ids", sampling.allowed_token_ids, vocab_size)
    for token_ids in sampling.bad_words_token_ids:
        _check_ids("bad_words_token_ids", token_ids, vocab_size)


def _check_ids(where: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    if not token_ids:
        return
    # Exact types: a bool is an int, but no token id.
    if set(map(type, token_ids)) != {int}:
        raise EngineRefusal(f"{where} has something that is no token id")
    if not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise EngineRefusal(f"{where} has token {wrong}; the model knows 0 ... {vocab_size - 1}")
