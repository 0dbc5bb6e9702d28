"""The answer to one call as its events come: joined by choice, counted, and written in a form."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import msgspec

from sagellm.gateway.answers.logprobs import Texts
from sagellm.gateway.answers.objects import (
    ApiFinishReason,
    ApiUsage,
    CompletionTokensDetails,
    PromptTokensDetails,
)
from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.encoding import EncodedPrompt
from sagellm.runtime.messages import OPERATOR_FAILED, SERVED, TokenEvent

_OVERLOADED = {
    "queue_full": "the server has too much to do; try again later",
    "slo_unreachable": "the first token would come too late; try again later",
    "unavailable": "no engine is there to serve the request; try again later",
}
_RETRY_S = 1.0  # where the graph does not say when
MayRetry = Callable[[], bool]


def error_of(event: TokenEvent, request_id: str, may_retry: MayRetry) -> ApiError | None:
    """None where the choice goes on, or was served. `may_retry` is asked of an overload only."""
    reason = event.finish_reason
    if reason is None or reason in SERVED or reason == "filtered":
        return None
    if reason == "refused":
        return _refused(event, may_retry)
    if reason == "expired":
        return ApiError(504, "the time that the request allowed is over", code="timeout")
    if reason == "cancelled":
        return _cancelled(event.code)
    if event.code == "request_quarantined":
        told = "the request made engines fail, and is not tried again"
        return ApiError(500, told, code=event.code, should_retry=False)
    if event.code == OPERATOR_FAILED:
        told = f"{event.error}; the server's log has it under request {request_id}"
        return ApiError(500, told, code=event.code)
    told = f"internal error; the operator finds it under request {request_id}"
    return ApiError(500, told, code="engine_failed")


def _refused(event: TokenEvent, may_retry: MayRetry) -> ApiError:
    if event.code == "bad_request":
        return ApiError(400, event.error or "the model cannot serve this request")
    if event.code not in _OVERLOADED:  # by an operator of the user's own
        return ApiError(400, event.error or "the graph refused the request", code="refused")
    return ApiError(
        503,
        _OVERLOADED[event.code],
        code=event.code,
        retry_after_s=event.retry_after_s or _RETRY_S,
        should_retry=may_retry(),
    )


def _cancelled(code: str) -> ApiError:
    if code == "slow_reader":
        return ApiError(503, "the answer was not read in time", code=code, should_retry=False)
    if code == "shutting_down":
        return ApiError(503, "the server is shutting down", code=code, retry_after_s=_RETRY_S)
    return ApiError(503, "the operator ended the request", code="abort", should_retry=False)


_NO_REASONING = CompletionTokensDetails()


class UsageCounter:
    """Counts of all prompts and choices of one call, as their events come."""

    def __init__(self) -> None:
        self._num_prompt: dict[int, int] = {}  # tokens of each prompt
        self._num_cached: dict[int, int] = {}
        self._num_completion = 0
        self.first_s: float | None = None  # when its first batch came, on the loop's clock

    def count(self, prompt: int, event: TokenEvent) -> None:
        """A prompt counts once; what of it was cached says its first choice: the others find what
        that one has left.
        """
        self._num_completion += event.num_tokens
        if event.num_prompt_tokens > self._num_prompt.get(prompt, 0):
            self._num_prompt[prompt] = event.num_prompt_tokens
        if event.choice == 0 and event.num_cached_tokens > self._num_cached.get(prompt, 0):
            self._num_cached[prompt] = event.num_cached_tokens

    @property
    def usage(self) -> ApiUsage:
        num_prompt = sum(self._num_prompt.values())
        return ApiUsage(
            prompt_tokens=num_prompt,
            completion_tokens=self._num_completion,
            total_tokens=num_prompt + self._num_completion,
            prompt_tokens_details=PromptTokensDetails(sum(self._num_cached.values())),
            completion_tokens_details=_NO_REASONING,
        )


EventBatch: TypeAlias = Sequence[tuple[int, TokenEvent]]  # with the number of its prompt
Indexed: TypeAlias = tuple[int, TokenEvent]  # with the index of its choice

FINISH: dict[str | None, ApiFinishReason | None] = {
    None: None,
    "stop": "stop",
    "length": "length",
    "filtered": "content_filter",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSpec:
    """What was asked for, as far as it shows in the answer."""

    id: str
    created: int
    model: str
    prompts: tuple[EncodedPrompt, ...]
    num_choices: int  # of each prompt
    num_logprobs: int | None = None  # most likely tokens beside each of the answer
    num_prompt_logprobs: int | None = None  # the same of the prompt, in vLLM's form
    has_token_ids: bool = False
    has_usage: bool = False
    has_continuous_usage: bool = False
    is_echo: bool = False
    is_prompt_only: bool = False  # what was generated is not shown

    @property
    def has_logprobs(self) -> bool:
        return self.num_logprobs is not None

    @property
    def num_indices(self) -> int:
        return len(self.prompts) * self.num_choices


class AnswerForm(Protocol):
    """How one of the APIs writes what came. Its events are whole server-sent events."""

    def opening(self, usage: ApiUsage | None) -> bytes:
        """Events before the first text."""

    def chunk(self, index: int, event: TokenEvent, usage: ApiUsage | None) -> bytes:
        """The event of one choice's next piece."""

    def usage(self, usage: ApiUsage) -> bytes:
        """The event of a stream's whole usage."""

    def whole(self, choices: Iterable[Indexed], usage: ApiUsage) -> bytes:
        """The JSON text of an answer that is not streamed."""


class MakeAnswerForm(Protocol):
    def __call__(self, asked: AnswerSpec, texts: Texts) -> AnswerForm: ...


class AnswerWriter:
    """Gathers the batches of one call, for one of: `chunks` and `ending`, or `add` and `whole`.

    Prompt i, choice j has index i * n + j, as in the OpenAI API.
    """

    def __init__(self, asked: AnswerSpec, form: AnswerForm, tally: UsageCounter) -> None:
        self._asked = asked
        self._form = form
        self._tally = tally
        self._num_unfinished = asked.num_indices
        self._is_begun = False
        self._parts: dict[int, list[TokenEvent]] = {}

    @property
    def is_finished(self) -> bool:
        """Whether each choice that was asked for has ended. A graph may have made more of them."""
        return self._num_unfinished <= 0

    def chunks(self, batch: EventBatch) -> bytes:
        """The events of what came together: one for each choice that it is of."""
        joined_batch = self._joined(batch)
        usage = self._tally.usage if self._asked.has_continuous_usage else None
        events = [self._form.chunk(index, event, usage) for index, event in joined_batch]
        if not self._is_begun:
            self._is_begun = True
            events.insert(0, self._form.opening(usage))
        return b"".join(events)

    def ending(self) -> bytes:
        """What comes after the last chunk."""
        return self._form.usage(self._tally.usage) if self._asked.has_usage else b""

    def add(self, batch: EventBatch) -> None:
        for index, event in self._joined(batch):
            self._parts.setdefault(index, []).append(event)

    def whole(self) -> bytes:
        """Of what was added."""
        choices = ((index, joined(self._parts[index])) for index in sorted(self._parts))
        return self._form.whole(choices, self._tally.usage)

    def _joined(self, batch: EventBatch) -> list[Indexed]:
        """One event a choice, in the order in which their first ones came."""
        parts: dict[int, list[TokenEvent]] = {}
        for prompt, event in batch:
            if self._asked.is_prompt_only:
                event = _ungenerated(event)
            self._tally.count(prompt, event)
            self._num_unfinished -= event.is_last
            index = prompt * self._asked.num_choices + event.choice
            parts.setdefault(index, []).append(event)
        return [(index, joined(events)) for index, events in parts.items()]


def _ungenerated(event: TokenEvent) -> TokenEvent:
    """Of the prompt alone: engines make one token at least, and nobody asked for it."""
    return msgspec.structs.replace(
        event,
        text="",
        token_ids=(),
        num_tokens_without_ids=0,
        logprobs=(),
        finish_reason="length" if event.finish_reason == "stop" else event.finish_reason,
        stop_reason=None,
    )


def joined(events: Sequence[TokenEvent]) -> TokenEvent:
    """One event that says what several of one choice say."""
    if len(events) == 1:
        return events[0]
    last = events[-1]
    return msgspec.structs.replace(
        last,
        position=events[0].position,
        text="".join(event.text for event in events),
        token_ids=tuple(token for event in events for token in event.token_ids),
        num_tokens_without_ids=sum(event.num_tokens_without_ids for event in events),
        logprobs=tuple(entry for event in events for entry in event.logprobs),
        prompt_logprobs=tuple(entry for event in events for entry in event.prompt_logprobs),
    )
