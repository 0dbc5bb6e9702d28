"""collect: joins the token events of a choice, and emits one whole answer at the last event."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from immutables import Map

from sagellm.graphs.vocabulary import ANSWER, EVENT, NoOptions, OpSpec, Port
from sagellm.runtime.messages import Answer, TokenEvent
from sagellm.runtime.operator import Arrival, Draw, Emit, Input, Setup, Signal, Step

SPEC = OpSpec("collect", (Port("in", EVENT),), (Port("out", ANSWER),), options=NoOptions)


@dataclass(frozen=True, slots=True)
class EventChain:
    """A linked list of the events of a choice, latest first. Adding an event copies no other
    event.
    """

    event: TokenEvent
    before: "EventChain | None" = None

    def __iter__(self) -> Iterator[TokenEvent]:
        """The events, latest first."""
        link: EventChain | None = self
        while link is not None:
            yield link.event
            link = link.before


ChainsByChoice: TypeAlias = Map[str, Mapping[int, EventChain]]  # request -> choice -> events


def answer_of(events: tuple[TokenEvent, ...]) -> Answer:
    """The answer of one choice, from all its events in order. Finish reason and error are those of
    the last event.
    """
    last = events[-1]
    return Answer(
        request_id=last.request_id,
        choice=last.choice,
        text="".join(event.text for event in events),
        token_ids=tuple(token for event in events for token in event.token_ids),
        num_tokens_without_ids=sum(event.num_tokens_without_ids for event in events),
        logprobs=tuple(logprob for event in events for logprob in event.logprobs),
        prompt_logprobs=tuple(logprob for event in events for logprob in event.prompt_logprobs),
        finish_reason=last.finish_reason or "stop",
        stop_reason=last.stop_reason,
        error=last.error,
        code=last.code,
        retry_after_s=last.retry_after_s,
        num_prompt_tokens=max(event.num_prompt_tokens for event in events),
        num_cached_tokens=max(event.num_cached_tokens for event in events),
        num_preemptions=max(event.num_preemptions for event in events),
        stamps=last.stamps,
    )


class Collect:
    """Emits one answer for each choice, at its last event. The answer of a cancelled choice has the
    tokens so far.
    """

    @property
    def initial(self) -> ChainsByChoice:
        return Map()

    def on(
        self, state: ChainsByChoice, happened: Input, now: float, draw: Draw
    ) -> Step[ChainsByChoice]:
        match happened:
            case Arrival(item=TokenEvent() as event):
                return self._gather(state, event)
            case Signal(kind="forget", request_id=request_id):
                return Step(_with_choices(state, request_id, {}))
        return Step(state)

    def _gather(self, state: ChainsByChoice, event: TokenEvent) -> Step[ChainsByChoice]:
        choices = dict(state.get(event.request_id, {}))
        chain = EventChain(event, choices.pop(event.choice, None))
        if not event.is_last:
            return Step(state.set(event.request_id, {**choices, event.choice: chain}))
        answer = answer_of(tuple(chain)[::-1])  # the chain iterates from the latest event
        return Step(_with_choices(state, event.request_id, choices), (Emit(answer),))


def _with_choices(
    state: ChainsByChoice, request_id: str, choices: Mapping[int, EventChain]
) -> ChainsByChoice:
    if choices:
        return state.set(request_id, choices)
    return state.delete(request_id) if request_id in state else state


def build(options: NoOptions, setup: Setup) -> Collect:
    return Collect()
