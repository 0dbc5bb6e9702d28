"""Sampling parameters, and the types and ranges of their values."""

from collections.abc import Iterable
from operator import attrgetter
from types import NoneType
from typing import Literal, TypeAlias, get_args

import msgspec

GrammarKind: TypeAlias = Literal["json_schema", "regex", "lark"]


class Grammar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The set of texts that an answer may have. The engine masks every token that leaves the set.

    `text`: the JSON text of a JSON schema, a regular expression in the syntax of Rust's `regex`, or
    a context-free grammar in llguidance's dialect of Lark. The state of a grammar follows from the
    emitted tokens, so a preempted, moved or resumed sequence needs nothing else.
    """

    kind: GrammarKind
    text: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise TypeError(f"kind is {self.kind!r}; it must be one of {get_args(GrammarKind)}")
        if not isinstance(self.text, str):
            raise TypeError("text must be a string")


_WHOLE, _NUMBER = "a whole number", "a number"
_SAMPLING_NUMBERS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    *((name, (int,), _WHOLE) for name in ("max_tokens", "min_tokens", "top_k", "n")),
    *((name, (int, NoneType), _WHOLE) for name in ("seed", "logprobs", "prompt_logprobs")),
    *(
        (name, (int, float), _NUMBER)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                     "frequency_penalty")
    ),
)  # fmt: skip
_SAMPLING_OTHERS: tuple[tuple[str, type | tuple[type, ...], str], ...] = (
    ("logit_bias", dict, "a dict of token ids and numbers"),
    ("stop", (tuple, list), "a tuple of strings"),
    ("stop_token_ids", (tuple, list), "a tuple of token ids"),
    ("allowed_token_ids", (tuple, list), "a tuple of token ids"),
    ("bad_words", (tuple, list), "a tuple of strings"),
    ("bad_words_token_ids", (tuple, list), "a tuple of tuples of token ids"),
    ("grammar", (Grammar, NoneType), "a Grammar or None"),
    ("ignore_eos", bool, "True or False"),
    ("skip_special_tokens", bool, "True or False"),
    ("include_stop_str_in_output", bool, "True or False"),
)
_KNOWN_TYPES: set[tuple[type, ...]] = set()  # the types of all fields of a Sampling that was valid
_MAX_KNOWN_TYPES = 256


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to sample tokens: greedily unless a temperature is given. Names as in the OpenAI API.

    `seed` None: the session sets a random seed when the request enters. `top_k` 0 and an empty
    `allowed_token_ids` allow all tokens. No answer completes a sequence of `bad_words_token_ids`;
    the session resolves the texts `bad_words` to such sequences. An answer without any token left
    to sample ends with reason "stop". `grammar`: a complete answer belongs to it; an answer that
    `max_tokens` or a stop string cuts off is the beginning of one that does. If no token is left
    before the grammar may end, the answer ends with reason "refused".
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    grammar: Grammar | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    logprobs: int | None = None  # k: of the sampled token and the k most likely tokens; None: none
    prompt_logprobs: int | None = None  # like `logprobs`, for prompt tokens; in the first event
    n: int = 1

    def __post_init__(self) -> None:
        """Raise TypeError for a value of a wrong type; `sampling_fault` checks the ranges.

        Valid combinations of types are remembered, so that most requests cost one look-up.
        """
        kinds = tuple(map(type, msgspec.structs.astuple(self)))
        if kinds not in _KNOWN_TYPES:
            self._check_types()
            if len(_KNOWN_TYPES) < _MAX_KNOWN_TYPES:
                _KNOWN_TYPES.add(kinds)

    def _check_types(self) -> None:
        for name, kinds, wanted in _SAMPLING_NUMBERS:
            value = getattr(self, name)
            # bool is a subclass of int, but True is no number of tokens.
            if not isinstance(value, kinds) or (value is True or value is False):
                raise TypeError(f"{name} is {value!r}; it must be {wanted}")
        for name, kind, wanted in _SAMPLING_OTHERS:
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")


MAX_LOGPROBS = 20  # tokens at each position, as in the OpenAI API
MAX_CHOICES = 128
_LARGE = 1 << 20

# Name -> smallest and largest value. NaN is outside every range.
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
_WHOLE_NAMES = frozenset(
    {"max_tokens", "min_tokens", "top_k", "logprobs", "prompt_logprobs", "n", "seed"}
)
_CHECKS = tuple(
    (name, low, high, (int,) if name in _WHOLE_NAMES else (int, float))
    for name, (low, high) in RANGES.items()
)
_values = attrgetter(*RANGES)
_BIAS = 100.0  # as in the OpenAI API


def sampling_fault(sampling: Sampling) -> str | None:
    """A message on the first invalid parameter (name, value and range), or None.

    Checks nothing that depends on the model, such as the size of its vocabulary.
    """
    for (name, low, high, kinds), value in zip(_CHECKS, _values(sampling), strict=True):
        if value is None:
            continue
        if value is True or value is False or not isinstance(value, kinds):
            kind = "whole number" if name in _WHOLE_NAMES else "number"
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
    """A message on the first collection with an element of a wrong type, or None."""
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
    """A number as text; a whole number has neither a decimal point nor an exponent."""
    return str(int(number)) if number == int(number) else f"{number:g}"
