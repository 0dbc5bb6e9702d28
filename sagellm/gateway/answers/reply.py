"""One call's answer as its events come: joined by choice, counted, and written in a form."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import msgspec

from sagellm.gateway.answers.logprobs import Texts
from sagellm.gateway.answers.structs import FinishReason, Usage
from sagellm.gateway.answers.usage import Tally
from sagellm.gateway.encoding import Prompt
from sagellm.runtime.messages import TokenEvent

Batch: TypeAlias = Sequence[tuple[int, TokenEvent]]  # with the number of its prompt
Indexed: TypeAlias = tuple[int, TokenEvent]  # with the index of its choice

FINISH: dict[str | None, FinishReason | None] = {
    None: None,
    "stop": "stop",
    "length": "length",
    "filtered": "content_filter",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked for, as far as it shows in the answer."""

    id: str
    created: int
    model: str
    prompts: tuple[Prompt, ...]
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


class Form(Protocol):
    """How one of the APIs writes what came. Its events are whole server-sent events."""

    def opening(self, usage: Usage | None) -> bytes:
        """Events before the first text."""

    def chunk(self, index: int, event: TokenEvent, usage: Usage | None) -> bytes:
        """The event of one choice's next piece."""

    def usage(self, usage: Usage) -> bytes:
        """The event of a stream's whole usage."""

    def whole(self, choices: Iterable[Indexed], usage: Usage) -> bytes:
        """The JSON text of an answer that is not streamed."""


class MakeForm(Protocol):
    def __call__(self, asked: Asked, texts: Texts) -> Form: ...


class Reply:
    """Gathers the batches of one call, for one of: `chunks` and `ending`, or `add` and `whole`.

    Prompt i, choice j has index i * n + j, as in the OpenAI API.
    """

    def __init__(self, asked: Asked, form: Form, tally: Tally) -> None:
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

    def chunks(self, batch: Batch) -> bytes:
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

    def add(self, batch: Batch) -> None:
        for index, event in self._joined(batch):
            self._parts.setdefault(index, []).append(event)

    def whole(self) -> bytes:
        """Of what was added."""
        choices = ((index, joined(self._parts[index])) for index in sorted(self._parts))
        return self._form.whole(choices, self._tally.usage)

    def _joined(self, batch: Batch) -> list[Indexed]:
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
