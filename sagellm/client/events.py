"""The calls of the OpenAI API in terms of a session, for a graph that is open in this process."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from sagellm.client.answers import (
    Body,
    Choice,
    Message,
    Piece,
    PromptDetails,
    Reply,
    Usage,
    piece,
    reply,
)
from sagellm.client.asking import CHAT, encode_plain
from sagellm.client.failure import NOT_OFFERED, ClientError
from sagellm.gateway.answers.reply import error_of
from sagellm.gateway.door import event_of
from sagellm.gateway.errors import ApiError, wrong
from sagellm.gateway.protocol.completions import (
    ChatRequest,
    CompletionRequest,
    read_chat,
    read_completion,
)
from sagellm.gateway.protocol.sampling import ModelFacts, sampling_of
from sagellm.gateway.settings import Limits
from sagellm.runtime.messages import SERVED, Answer, Sampling, TokenEvent
from sagellm.session import Encoded, Output, Prompt, RequestError

_ANY_ID = 1 << 31  # which ids the model knows, its engine checks
_FIELDS = ("request_id", "priority", "slo_ttft_s", "timeout_s")
_READ = frozenset(
    {*Sampling.__struct_fields__, *_FIELDS, "max_completion_tokens", "user", "stream_options"}
) - {"logprobs", "prompt_logprobs", "bad_words_token_ids"}


class Tokens(Protocol):
    """What of an open session bounds a call."""

    @property
    def max_model_len(self) -> int: ...

    def encode(self, prompt: Prompt) -> Encoded: ...


class Call(msgspec.Struct, frozen=True):
    """One call as a session takes it."""

    prompt: Prompt
    sampling: Sampling
    fields: dict[str, Any]


def read_call(
    path: str, call: Mapping[str, Any], options: Mapping[str, Any], session: Tokens
) -> Call:
    """Checked as the gateway checks the same call. Raises ClientError."""
    try:
        return _read(path, encode_plain({**call, **options}), options, session)
    except RequestError as error:
        raise ClientError(str(error), status=400, type="invalid_request_error") from error
    except ApiError as error:
        raise ClientError(
            error.message,
            status=error.status,
            code=error.code,
            type=error.type,
            param=error.param,
        ) from None


def _check_names(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _READ:
            cause = f"{name}: is not served by a graph in this process; serve it over HTTP"
            raise ClientError(cause, status=400, code=NOT_OFFERED, param=name)


def _read(path: str, body: bytes, options: Mapping[str, Any], session: Tokens) -> Call:
    facts = ModelFacts(_ANY_ID, session.max_model_len)
    request: ChatRequest | CompletionRequest
    if path == CHAT:
        request = chat = read_chat(body, Limits())
        prompt: Prompt = chat.conversation
    else:
        request = completion = read_completion(body, Limits())
        if len(completion.prompts) != 1:
            raise wrong("prompt", "is a list of them; give one")
        (prompt,) = completion.prompts
    _check_names(options)  # after what no server knows either
    encoded = session.encode(prompt)
    sampling = sampling_of(request, facts, len(encoded.token_ids))
    return Call(encoded, sampling, _fields(request))


def _fields(request: Any) -> dict[str, Any]:
    said = {name: getattr(request, name) for name in _FIELDS}
    return {name: value for name, value in said.items() if value is not None}


class Tally:
    """Makes pieces of a stream's events, and the usage that its last piece has."""

    def __init__(self, num_choices: int) -> None:
        self._num_open = num_choices
        self._num_prompt = self._num_cached = self._num_drawn = 0

    def piece_of(self, event: Output) -> Piece:
        """Raises ClientError where the event ends a choice unserved."""
        check(event)
        self._num_open -= event.is_last
        self._num_drawn += event.num_tokens
        self._num_prompt = max(self._num_prompt, event.num_prompt_tokens)
        self._num_cached = max(self._num_cached, event.num_cached_tokens)
        return piece(
            event.text,
            choice=event.choice,
            finish_reason=event.finish_reason,
            stop_reason=event.stop_reason,
            usage=None if self._num_open else self._usage,
        )

    @property
    def _usage(self) -> Usage:
        return _usage(self._num_prompt, self._num_cached, self._num_drawn)


def reply_of(answers: Sequence[Answer], model: str) -> Reply:
    """The whole answer. Raises ClientError where a choice ended unserved."""
    for answer in answers:
        check(answer)
    choices = tuple(
        Choice(
            index=answer.choice,
            message=Message("assistant", answer.text),
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
        )
        for answer in answers
    )
    return reply(Body(answers[0].request_id, model, choices, usage_of(answers)))


def usage_of(answers: Sequence[Answer]) -> Usage:
    """Tokens of all choices; the prompt is counted once, as the OpenAI API does."""
    return _usage(
        max(answer.num_prompt_tokens for answer in answers),
        max(answer.num_cached_tokens for answer in answers),
        sum(answer.num_tokens for answer in answers),
    )


def _usage(num_prompt: int, num_cached: int, num_drawn: int) -> Usage:
    return Usage(num_prompt, num_drawn, num_prompt + num_drawn, PromptDetails(num_cached))


def check(end: Output) -> None:
    """Raise ClientError for the end of a choice that is no answer."""
    reason = end.finish_reason
    if reason is None or reason in SERVED:
        return
    raise unserved(end, end.error or f"the graph ended the request: {reason}")


def unserved(end: Output, message: str) -> ClientError:
    """The error of an end that is no answer, with the status, code and type of the gateway's."""
    event = end if isinstance(end, TokenEvent) else event_of(end)
    told = error_of(event, end.request_id, lambda: True)
    if told is None:  # filtered: over HTTP an answer with the finish reason content_filter
        return ClientError(message, code=str(end.finish_reason))
    return ClientError(
        message,
        status=told.status,
        code=told.code,
        type=told.type,
        retry_after_s=end.retry_after_s,
    )
