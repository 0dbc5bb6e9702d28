"""What sampling parameters may be: one table, for whoever takes them from outside."""

from collections.abc import Iterable
from operator import attrgetter

from sagellm.runtime.messages import Sampling

MAX_LOGPROBS = 20  # most likely tokens at each position, as in the OpenAI API
MAX_CHOICES = 128
_LARGE = 1 << 20

# name -> smallest, largest. NaN is outside every range.
RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (1, _LARGE),
    "min_tokens": (0, _LARGE),
    "temperature": (0, 100),
    "top_k": (0, 1 << 31),  # 0: all
    "top_p": (1e-9, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-3, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "n": (1, MAX_CHOICES),
    "seed": (-(1 << 63), (1 << 63) - 1),
}
_WHOLE = frozenset(
    {"max_tokens", "min_tokens", "top_k", "logprobs", "prompt_logprobs", "n", "seed"}
)
_CHECKS = tuple(
    (name, low, high, (int,) if name in _WHOLE else (int, float))
    for name, (low, high) in RANGES.items()
)
_values = attrgetter(*RANGES)
_BIAS = 100.0  # as in the OpenAI API


def sampling_fault(sampling: Sampling) -> str | None:
    """What is wrong with the parameters, the model aside: name, value and range; or None."""
    for (name, low, high, kinds), value in zip(_CHECKS, _values(sampling), strict=True):
        if value is None:
            continue
        if value is True or value is False or not isinstance(value, kinds):
            kind = "whole number" if name in _WHOLE else "number"
            return f"{name} is {value!r}; it must be a {kind}"
        if not low <= value <= high:
            return f"{name} is {value}; it must be from {_shown(low)} to {_shown(high)}"
    if sampling.min_tokens > sampling.max_tokens:
        return f"min_tokens is {sampling.min_tokens}, more than max_tokens ({sampling.max_tokens})"
    if sampling.stop and not all(isinstance(text, str) and text for text in sampling.stop):
        return "stop holds an empty string, or no string; leave it out"
    wrong = _fault_of_parts(sampling)
    if wrong is not None:
        return wrong
    if not all(abs(bias) <= _BIAS for bias in sampling.logit_bias.values()):
        return f"logit_bias has a value outside {-_BIAS:g} to {_BIAS:g}"
    return _fault_of_bans(sampling)


def _fault_of_parts(sampling: Sampling) -> str | None:
    """The types of what collections hold."""
    if not all(isinstance(ids, tuple | list) for ids in sampling.bad_words_token_ids):
        return "bad_words_token_ids has something that is no sequence of token ids"
    token_ids: tuple[tuple[str, Iterable[object]], ...] = (
        ("logit_bias", sampling.logit_bias),
        ("stop_token_ids", sampling.stop_token_ids),
        ("allowed_token_ids", sampling.allowed_token_ids),
        *(("bad_words_token_ids", ids) for ids in sampling.bad_words_token_ids),
    )
    for name, ids in token_ids:
        if ids and not set(map(type, ids)) <= {int}:
            return f"{name} has something that is no token id"
    if not set(map(type, sampling.logit_bias.values())) <= {int, float}:
        return "logit_bias has something that is no number"
    return None


def _fault_of_bans(sampling: Sampling) -> str | None:
    if not sampling.bad_words and not sampling.bad_words_token_ids:
        return None
    if not all(isinstance(word, str) and word for word in sampling.bad_words):
        return "bad_words holds an empty string, or no string; leave it out"
    if not all(sampling.bad_words_token_ids):
        return "bad_words_token_ids holds an empty sequence; leave it out"
    banned = {ids[0] for ids in sampling.bad_words_token_ids if len(ids) == 1}
    if sampling.allowed_token_ids and banned.issuperset(sampling.allowed_token_ids):
        return "allowed_token_ids are all banned by bad_words; allow another token"
    return None


def _shown(number: float) -> str:
    """Whole numbers without a point or an exponent."""
    return str(int(number)) if number == int(number) else f"{number:g}"
