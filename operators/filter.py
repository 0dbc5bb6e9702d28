"""filter: emits the items for which a user's function returns true."""

from dataclasses import dataclass

import msgspec

from sagellm.graphs.vocabulary import OpSpec, Port
from sagellm.runtime.messages import Item, TokenEvent
from sagellm.runtime.operator import (
    Arrival,
    Draw,
    Emit,
    Input,
    OperatorOutput,
    Setup,
    Step,
    Terminate,
)
from sagellm.runtime.user_function import (
    UserFunction,
    end_event,
    failure_event,
    find_plain_function,
)


@dataclass(frozen=True, slots=True)
class FilterOptions:
    """`function`: item -> whether to emit the item."""

    function: str


SPEC = OpSpec(
    "filter",
    (Port("in", "request|event|answer"),),
    (Port("out", "same"),),
    options=FilterOptions,
    drops_tokens=True,
)


@dataclass(frozen=True, slots=True)
class Filter:
    """Ends a request or an answer as `filtered` if the function returns false.

    A token event is dropped instead, and its sequence goes on. The last event of a sequence is
    always emitted, because it ends the answer; if the function returns false for it, the event
    loses its text and tokens. If the function raises, the request fails, and the executor stops its
    sequence.
    """

    function: UserFunction

    @property
    def initial(self) -> None:
        return None

    def on(self, state: None, happened: Input, now: float, draw: Draw) -> Step[None]:
        match happened:
            case Arrival(item=item):
                return Step(None, self._sieve(item, now))
        return Step(None)

    def _sieve(self, item: Item, now: float) -> tuple[OperatorOutput, ...]:
        try:
            passes = self._passes(item)
        except Exception as error:
            why = self.function.explain(error)
            return (Terminate(failure_event(item, why, now=now), error),)
        if passes:
            return (Emit(item),)
        if not isinstance(item, TokenEvent):
            return (Terminate(end_event(item, "filtered", now=now)),)
        # Without a last event the answer would never end.
        return (Emit(_emptied(item)),) if item.is_last else ()

    def _passes(self, item: Item) -> bool:
        """Whether the function returns a true value. Raises WrongResult for None, because None
        usually means that the function lacks a `return`.
        """
        result = self.function(item)
        if result is None:
            raise self.function.wanted(result, "True or False")
        return bool(result)


def _emptied(event: TokenEvent) -> TokenEvent:
    """The event without text and tokens; its finish reason stays."""
    return msgspec.structs.replace(
        event, text="", token_ids=(), num_tokens_without_ids=0, logprobs=()
    )


def build(options: FilterOptions, setup: Setup) -> Filter:
    return Filter(find_plain_function(setup, options.function))
