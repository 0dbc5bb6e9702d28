"""Checks of a session's requests, and the exceptions of requests that are not served."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple, TypeAlias, cast

import msgspec

from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.messages import NORMAL, PRIORITIES, Answer, TokenEvent
from sagellm.runtime.models import HelperUnavailable, TextError
from sagellm.runtime.models.tokenizer import Messages, Tokenizer, bad_words_token_ids
from sagellm.runtime.sampling import Sampling, sampling_fault
from sagellm.runtime.user_code import failure_text

_SPAN = 1 << 31  # a bound on token ids, larger than any vocabulary


class RequestError(ValueError):
    """The request is wrong, and has not entered the graph. The message has the reason."""


class Encoded(msgspec.Struct, frozen=True):
    """A prompt as text and as tokens. Neither is computed again from the other.

    For an engine that takes text, `token_ids` is empty, and the prompt is the text or `messages`.
    """

    text: str
    token_ids: tuple[int, ...]
    messages: tuple[dict[str, Any], ...] = ()


Prompt: TypeAlias = str | Encoded | Sequence[int] | Sequence[Mapping[str, Any]]


def encode(tokenizer: Tokenizer, prompt: Prompt) -> Encoded:
    """Return the text and the tokens of a prompt. A `map` before the model may rewrite the text.

    Raises RequestError for a value that is no prompt, and for an empty prompt.
    """
    with _admitted():
        encoded = _encoded(tokenizer, prompt)
    if not encoded.token_ids:
        raise empty_prompt()
    return encoded


def empty_prompt() -> RequestError:
    return RequestError("the prompt is empty; give at least one token")


def read_text(prompt: Prompt) -> Encoded:
    """Return the prompt of a model whose engine takes text.

    Raises RequestError for token ids, for a value that is no prompt, and for an empty prompt.
    """
    if isinstance(prompt, str):
        read = Encoded(_unicode(prompt), ())
    elif isinstance(prompt, Encoded):
        read = Encoded(_unicode(prompt.text), (), prompt.messages)
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        read = Encoded("", (), tuple(dict(cast(Mapping[str, Any], one)) for one in prompt))
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        raise RequestError("the engine of this model takes text; give text or messages, not ids")
    else:
        raise RequestError(f"a prompt is text or messages, not {_kind(prompt)}")
    if not read.text and not read.messages:
        raise RequestError("the prompt is empty; give some text")
    return read


def encode_bad_words(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return bad words as token ids. Raises RequestError if the tokenizer rejects a word."""
    with _admitted():
        return bad_words_token_ids(tokenizer, words)


@contextmanager
def _admitted() -> Iterator[None]:
    """Turn the errors of the model's template and tokenizer into RequestError."""
    try:
        yield
    except (TextError, HelperUnavailable) as error:
        raise RequestError(str(error)) from error


def encode_prompt(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Return the tokens of a prompt.

    Leading special tokens are not added if the text begins with them, as a rendered chat does.
    """
    plain, full = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
    return plain if plain[:1] == full[:1] else full


def _encoded(tokenizer: Tokenizer, prompt: Prompt) -> Encoded:
    if isinstance(prompt, Encoded):
        return Encoded(_unicode(prompt.text), _read_ids(prompt.token_ids))
    if isinstance(prompt, str):
        return Encoded(prompt, tokenizer.encode(_unicode(prompt)))
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise RequestError(f"a prompt is text, token ids or messages, not {_kind(prompt)}")
    if prompt and isinstance(prompt[0], Mapping):
        # Chat templates write the special tokens themselves.
        text = _unicode(tokenizer.apply_chat_template(cast(Messages, prompt)))
        return Encoded(text, tokenizer.encode(text, add_special_tokens=False))
    token_ids = _read_ids(prompt)
    # With special tokens: an operator may rewrite this text, which is then encoded again.
    return Encoded(tokenizer.decode(token_ids, skip_special_tokens=False), token_ids)


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not Unicode text: {error.reason}") from error
    return text


def _read_ids(prompt: Sequence[Any]) -> tuple[int, ...]:
    """Return token ids as plain integers. The engine checks them against its vocabulary."""
    for token in prompt:  # bool is a subclass of int, but true is no token id
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < _SPAN:
            raise RequestError(f"the prompt has {token!r} where a token id should be")
    return tuple(prompt)


def _kind(value: object) -> str:
    return type(value).__name__


class _Fields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of a request other than its prompt and sampling."""

    request_id: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] = ""
    priority: Annotated[int, msgspec.Meta(ge=0, le=4)] = NORMAL
    user_id: str = ""
    model: str = ""
    salt: Annotated[str, msgspec.Meta(max_length=256)] = ""
    trace: Annotated[str, msgspec.Meta(max_length=512)] = ""
    slo_ttft_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    waited_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    cost_budget: Annotated[float, msgspec.Meta(ge=0)] | None = None
    no_queue: bool = False
    tags: dict[str, str] = {}


class Timing(NamedTuple):
    """The arrival and the timeout of a request, as durations: clocks of two processes differ.

    `waited_s` is the time from the arrival at the caller to the submission. `timeout_s` counts
    from the arrival; None means no timeout.
    """

    timeout_s: float | None = None
    waited_s: float = 0.0


def read_fields(fields: Mapping[str, Any]) -> tuple[dict[str, Any], Timing]:
    """Return the checked fields of a `Request`, and its timing.

    The field `trace` becomes the tag "traceparent". Raises RequestError for a wrong field.
    """
    for name in fields:
        if name not in _Fields.__struct_fields__:
            raise RequestError(f"a request has no field {name!r}; {_hint(name)}")
    if fields.get("priority") in PRIORITIES:
        fields = {**fields, "priority": PRIORITIES[fields["priority"]]}
    try:
        read = msgspec.convert(fields, _Fields)
    except msgspec.ValidationError as error:
        raise RequestError(f"a field of the request is wrong: {error}") from error
    known = {name: getattr(read, name) for name in fields}
    if known.pop("trace", ""):
        known["tags"] = {**read.tags, "traceparent": read.trace}
    return known, Timing(known.pop("timeout_s", None), known.pop("waited_s", 0.0))


def _hint(name: str) -> str:
    """Return the end of the message for an unknown field: the likely correction."""
    if name in Sampling.__struct_fields__:
        return f"it belongs to the sampling: sampling=Sampling({name}=...)"
    close = nearest(name, (*_Fields.__struct_fields__, *Sampling.__struct_fields__))
    if close in Sampling.__struct_fields__:
        return f"did you mean sampling=Sampling({close}=...)?"
    known = ", ".join(_Fields.__struct_fields__)
    return f"did you mean {close!r}?" if close else f"known are {known}"


def check_room(num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
    """Raise RequestError if `max_tokens` is more than the prompt leaves of the context."""
    room = max_model_len - num_prompt_tokens
    if 0 < room < max_tokens:
        raise RequestError(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}; the "
            f"context limit is {max_model_len} in all; give max_tokens {room} or less, "
            "or a shorter prompt"
        )


def read_sampling(sampling: Sampling) -> Sampling:
    """Return sampling parameters, with types and ranges checked. Raises RequestError."""
    # The constructor of a msgspec struct does not check its arguments, so convert them again.
    if not isinstance(sampling, Sampling):
        raise RequestError(f"sampling is a Sampling, not {_kind(sampling)}")
    try:
        read = msgspec.convert(msgspec.structs.asdict(sampling), Sampling)
    except msgspec.ValidationError as error:
        raise RequestError(f"sampling is wrong: {error}") from error
    fault = sampling_fault(read)
    if fault is not None:
        raise RequestError(fault)
    return read


class RequestRefused(RequestError):
    """The graph refused the request. The message has the reason.

    `code` is a key of `CODES` in `sagellm.runtime.messages`, or empty. `retry_after_s` is the
    recommended wait before another attempt, in seconds, or None. `end` is the last event of the
    choice, or the unfinished answer.
    """

    def __init__(self, end: TokenEvent | Answer) -> None:
        super().__init__(end.error or "the graph refused the request")
        self.end = end
        self.code = end.code
        self.retry_after_s = end.retry_after_s


class RequestFailed(RuntimeError):
    """The request failed in the graph.

    If the user's own code raised, `__cause__` is the exception, and the message has the operator
    and the exception's type, text, file and line. For `code` and `end` see `RequestRefused`.
    """

    def __init__(self, end: TokenEvent | Answer, cause: BaseException | None = None) -> None:
        super().__init__(failure_text(end.error or "the request failed in the graph", cause))
        self.end = end
        self.code = end.code


def raise_unserved(end: TokenEvent | Answer, cause: BaseException | None = None) -> None:
    """Raise RequestRefused if `end` has finish reason "refused", RequestFailed if "failed".

    `cause` is the exception that made the choice fail. Other finish reasons raise nothing.
    """
    if end.finish_reason == "refused":
        raise RequestRefused(end)
    if end.finish_reason == "failed":
        raise RequestFailed(end, cause) from cause
