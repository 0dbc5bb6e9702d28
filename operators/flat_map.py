"""flat_map: calls a user's function on each item, and emits a request for each returned prompt."""

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from sagellm.graphs.vocabulary import OpSpec, Port
from sagellm.runtime.messages import Answer, Forked, Item, Request
from sagellm.runtime.operator import (
    Announce,
    Arrival,
    Draw,
    Emit,
    EncodeText,
    Input,
    OperatorOutput,
    Setup,
    Step,
    Terminate,
)
from sagellm.runtime.user_function import (
    UserFunction,
    apply_result,
    end_event,
    failure_event,
    find_plain_function,
)


@dataclass(frozen=True, slots=True)
class FlatMapOptions:
    """`function`: request -> list of prompts or requests; answer -> list of values."""

    function: str


SPEC = OpSpec(
    "flat_map",
    (Port("in", "request|answer"),),
    (Port("out", "same"),),
    options=FlatMapOptions,
    drops_tokens=True,
)


@dataclass(frozen=True, slots=True)
class FlatMap:
    """Turns a request into k requests, where k is the number of results: the choices 0 ... k - 1 of
    the same request id, each with `sampling.n` = k. With k = 0 the request ends as filtered.

    A request that already is one of several choices (n > 1, perhaps by an earlier flat_map) is
    refused. All k requests are emitted at once, so flat_map must come before `policy_sort`: without
    a queue, an engine with credit for fewer than k requests would block the graph forever. An
    answer stays one answer, whose `value` becomes the tuple of the results.
    """

    name: str
    function: UserFunction
    encode: EncodeText | None

    @property
    def initial(self) -> None:
        return None

    def on(self, state: None, happened: Input, now: float, draw: Draw) -> Step[None]:
        match happened:
            case Arrival(item=item):
                return Step(None, self._spread(item, now))
        return Step(None)

    def _spread(self, item: Item, now: float) -> tuple[OperatorOutput, ...]:
        if isinstance(item, Request) and item.sampling.n > 1:
            why = f"{self.name}: it is one of n={item.sampling.n} choices already: ask for n=1"
            return (Terminate(end_event(item, "refused", now=now, error=why)),)
        try:
            return self._parts(item, now)
        except Exception as error:
            why = self.function.explain(error)
            return (Terminate(failure_event(item, why, now=now), error),)

    def _parts(self, item: Item, now: float) -> tuple[OperatorOutput, ...]:
        results = self._listed(item)
        if isinstance(item, Answer):  # an answer has ended: it cannot become several choices
            return (Emit(msgspec.structs.replace(item, value=results)),)
        if not isinstance(item, Request):
            raise TypeError(f"flat_map takes requests and answers, not {type(item).__name__}")
        if not results:
            return (Terminate(end_event(item, "filtered", now=now)),)
        sampling = msgspec.structs.replace(item.sampling, n=len(results))
        choices = (apply_result(self.function, item, result, self.encode) for result in results)
        emits = tuple(
            Emit(msgspec.structs.replace(request, choice=choice, sampling=sampling))
            for choice, request in enumerate(choices)
        )
        return (Announce(Forked(request_id=item.request_id, num_choices=len(emits))), *emits)

    def _listed(self, item: Item) -> tuple[object, ...]:
        """Call the function, and return its results.

        Raises WrongResult for a result that is not iterable, and for a text, which would be split
        into letters.
        """
        results = self.function(item)
        if isinstance(results, str | bytes) or not isinstance(results, Iterable):
            raise self.function.wanted(results, "a list")
        return tuple(results)


def build(options: FlatMapOptions, setup: Setup) -> FlatMap:
    return FlatMap(setup.name, find_plain_function(setup, options.function), setup.encode)
