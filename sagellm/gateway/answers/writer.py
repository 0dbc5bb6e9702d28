"""Writes the answer to one call: joins events by choice, counts tokens, and converts errors."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import msgspec

from sagellm.chat_formats import OpenParser, Reasoning, open_plain_parser
from sagellm.gateway.answers.logprobs import Texts
from sagellm.gateway.answers.objects import (
    ApiFinishReason,
    ApiUsage,
    CompletionTokensDetails,
    PromptTokensDetails,
)
from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.graph_bridge import EventBatch, graph_closed
from sagellm.runtime.messages import OPERATOR_FAILED, SERVED, TokenEvent
from sagellm.session.requests import Encoded

_OVERLOADED = {
    "queue_full": "the server has too much to do; try again later",
    "slo_unreachable": "the tokens would come too late; try again later",
    "decode_full": "the engines have too much to do; try again later",
    "concurrency_limit": "the server has too much to do; try again later",
    "would_wait": "the request would have to wait, and asked not to; try again later",
    "unavailable": "no engine is there to serve the request; try again later",
}
_RETRY_S = 1.0  # Retry-After if the graph gives no time
MayRetry = Callable[[], bool]


def error_of(event: TokenEvent, request_id: str, may_retry: MayRetry) -> ApiError | None:
    """Return the error for the last event of an unserved choice; None for any other event.

    `may_retry` spends a retry, and is called for overload only.
    """
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
    """Return 400 for a wrong request, and 503 for overload."""
    if event.code == "bad_request":
        return ApiError(400, event.error or "the model cannot serve this request")
    if event.code == "invalid_grammar":
        return ApiError(400, f"the grammar of the answer: {event.error}", code=event.code)
    if event.code not in _OVERLOADED:  # by a user's own operator
        return ApiError(400, event.error or "the graph refused the request", code="refused")
    return ApiError(
        503,
        _OVERLOADED[event.code],
        code=event.code,
        retry_after_s=event.retry_after_s or _RETRY_S,
        # Who does not want to wait would not want a client to try again and again, either.
        should_retry=event.code != "would_wait" and may_retry(),
    )


def _cancelled(code: str) -> ApiError:
    if code == "slow_reader":
        return ApiError(503, "the answer was not read in time", code=code, should_retry=False)
    if code == "shutting_down":
        return ApiError(503, "the server is shutting down", code=code, retry_after_s=_RETRY_S)
    return ApiError(503, "the operator ended the request", code="abort", should_retry=False)


class UsageCounter:
    """Counts the tokens of one call, over all its prompts and choices."""

    def __init__(self) -> None:
        self._num_prompt: dict[int, int] = {}  # number of a prompt -> its tokens
        self._num_cached: dict[int, int] = {}
        self._num_completion = 0
        self.num_reasoning = 0  # tokens of the answer that are reasoning
        self.first_s: float | None = None  # time of the first batch, on the loop's clock

    def count(self, prompt: int, event: TokenEvent) -> None:
        """Count the tokens of an event. `prompt`: the number of the event's prompt.

        The tokens of a prompt count once, not for each choice.
        """
        # Cached tokens count for choice 0 only: other choices find its blocks in the cache.
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
            completion_tokens_details=CompletionTokensDetails(self.num_reasoning),
        )


Indexed: TypeAlias = tuple[int, TokenEvent]  # (index of the choice in the answer, event)

FINISH: dict[str | None, ApiFinishReason | None] = {
    None: None,
    "stop": "stop",
    "length": "length",
    "filtered": "content_filter",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSpec:
    """The fields of a request that determine the content of its answer."""

    id: str
    created: int
    model: str
    prompts: tuple[Encoded, ...]
    num_choices: int  # choices of each prompt
    num_logprobs: int | None = None  # most likely tokens shown for each token of the answer
    num_prompt_logprobs: int | None = None  # the same for each token of the prompt, as in vLLM
    has_token_ids: bool = False
    has_usage: bool = False
    has_continuous_usage: bool = False
    is_echo: bool = False
    is_prompt_only: bool = False  # the answer shows no generated tokens
    open_parser: OpenParser = open_plain_parser  # of a choice: content, reasoning and tool calls
    has_reasoning: bool = False  # there may be reasoning among the parts
    shows_reasoning: bool = True

    @property
    def has_logprobs(self) -> bool:
        return self.num_logprobs is not None

    @property
    def num_indices(self) -> int:
        return len(self.prompts) * self.num_choices


class AnswerForm(Protocol):
    """Writes the answer to one call in the form of one API. Events are server-sent events."""

    def opening(self, usage: ApiUsage | None) -> bytes:
        """Return the events that start a stream, before the first chunk."""

    def chunk(self, index: int, event: TokenEvent, usage: ApiUsage | None) -> bytes:
        """Return the event for the next piece of the choice `index`."""

    def ending(self, usage: ApiUsage) -> bytes:
        """Return the events that end a stream. `usage`: that of the whole call."""

    def failure(self, error: ApiError) -> bytes:
        """Return the events that end a stream whose answer is not whole."""

    def whole(self, choices: Iterable[Indexed], usage: ApiUsage) -> bytes:
        """Return the JSON text of a whole answer that is not streamed."""


class MakeAnswerForm(Protocol):
    def __call__(self, asked: AnswerSpec, texts: Texts) -> AnswerForm: ...


class ReasoningCounter:
    """Counts the tokens of one choice that are reasoning, without the marks around it.

    Reasoning may come after content: gpt-oss may write a preamble before it.
    """

    def __init__(self, open_parser: OpenParser) -> None:
        self._parser = open_parser()
        self._is_inside = False
        self._num_pending = 0  # tokens inside that completed no part: reasoning, or its end

    def count(self, event: TokenEvent) -> int:
        """Return the number of tokens that the event shows to be reasoning."""
        parts = self._parser.push(event.text)
        if event.is_last:
            parts = parts + self._parser.finish()
        if not parts:
            self._num_pending += event.num_tokens if self._is_inside else 0
            return 0
        inside = sum(len(part.text) for part in parts if isinstance(part, Reasoning))
        before, self._num_pending = self._num_pending, 0
        self._is_inside = isinstance(parts[-1], Reasoning)
        if not inside:
            return 0
        # Only if several tokens share an event may some of them be no reasoning.
        is_all = all(isinstance(part, Reasoning) for part in parts)
        share = 1.0 if is_all else inside / max(inside, len(event.text))
        return before + round(event.num_tokens * share)


class AnswerWriter:
    """Writes the answer to one call.

    For a stream, call `chunks` for each batch, then `ending`. For a whole answer, call `add` for
    each batch, then `whole`. Choice j of prompt i has index i * n + j, as in the OpenAI API.
    """

    def __init__(self, asked: AnswerSpec, form: AnswerForm, counter: UsageCounter) -> None:
        self._asked = asked
        self._form = form
        self._counter = counter
        self._num_unfinished = asked.num_indices
        self._is_begun = False
        self._parts: dict[int, list[TokenEvent]] = {}
        self._reasoning: dict[int, ReasoningCounter] = {}  # by choice

    @property
    def is_finished(self) -> bool:
        """Whether all requested choices have ended. The graph may have made more choices."""
        return self._num_unfinished <= 0

    def check_finished(self) -> None:
        """Raise ApiError if a choice has not ended: an incomplete answer must not look complete."""
        if not self.is_finished:
            raise graph_closed()

    def chunks(self, batch: EventBatch) -> bytes:
        """Return the server-sent events of a batch: one for each choice in the batch."""
        joined_batch = self._joined(batch)
        usage = self._counter.usage if self._asked.has_continuous_usage else None
        # The opening is made first: forms may number their events.
        events = [] if self._is_begun else [self._form.opening(usage)]
        self._is_begun = True
        events += [self._form.chunk(index, event, usage) for index, event in joined_batch]
        return b"".join(events)

    def ending(self) -> bytes:
        """Return the events after the last chunk."""
        return self._form.ending(self._counter.usage)

    def failure(self, error: ApiError) -> bytes:
        """Return the events that end a stream whose answer is not whole."""
        return self._form.failure(error)

    def add(self, batch: EventBatch) -> None:
        """Add a batch to the whole answer."""
        for index, event in self._joined(batch):
            self._parts.setdefault(index, []).append(event)

    def whole(self) -> bytes:
        """Return the JSON text of the whole answer, from all added batches."""
        choices = ((index, joined(self._parts[index])) for index in sorted(self._parts))
        return self._form.whole(choices, self._counter.usage)

    def _joined(self, batch: EventBatch) -> list[Indexed]:
        """Count a batch, and join its events to one for each choice, in the order of arrival."""
        parts: dict[int, list[TokenEvent]] = {}
        for prompt, event in batch:
            if self._asked.is_prompt_only:
                event = _ungenerated(event)
            self._counter.count(prompt, event)
            self._num_unfinished -= event.is_last
            index = prompt * self._asked.num_choices + event.choice
            if self._asked.has_reasoning:
                self._count_reasoning(index, event)
            parts.setdefault(index, []).append(event)
        return [(index, joined(events)) for index, events in parts.items()]

    def _count_reasoning(self, index: int, event: TokenEvent) -> None:
        # Here and not in the form: a form sees a whole answer as one event, without its tokens.
        counter = self._reasoning.get(index)
        if counter is None:
            counter = self._reasoning[index] = ReasoningCounter(self._asked.open_parser)
        self._counter.num_reasoning += counter.count(event)


def _ungenerated(event: TokenEvent) -> TokenEvent:
    """Return an event without its generated tokens, for an answer that is only an echo."""
    # Engines generate at least one token, even if the client wants none.
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
    """Return one event that joins several events of one choice."""
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
