"""map: calls a user's function, plain or async, on each item, and emits the result."""

from dataclasses import dataclass, field

from sagellm.graphs.vocabulary import OpSpec, Port
from sagellm.runtime.messages import Item, Request, TokenEvent
from sagellm.runtime.operator import (
    Arrival,
    Context,
    Credit,
    Draw,
    Emit,
    EncodeText,
    Input,
    OperatorOutput,
    Setup,
    Signal,
    Step,
    Terminate,
)
from sagellm.runtime.port import EngineEvent, EngineFacts
from sagellm.runtime.user_function import (
    UserFunction,
    apply_result,
    end_event,
    failure_event,
    find_function,
)

DEFAULT_CONCURRENCY = 16  # an async function mostly waits for a service, which serves several calls


@dataclass(frozen=True, slots=True)
class MapOptions:
    """`function`: request -> prompt or request; token event -> text or token event; answer -> any
    value (a text also replaces the answer's text).

    `concurrency`: the most concurrent calls of an async function; None: 16. The option is refused
    for a plain function.
    """

    function: str
    concurrency: int | None = field(default=None, metadata={"min": 1})


SPEC = OpSpec(
    "map",
    (Port("in", "request|event|answer"),),
    (Port("out", "same"),),
    options=MapOptions,
    signals=frozenset(),  # the operator has no state of a request that a signal could end
    drops_tokens=True,
)


@dataclass(frozen=True, slots=True)
class Map:
    """Calls a plain function on each item. The function must not block: it would block the graph.

    If the function raises, or returns a value of a wrong type, only that request fails. The
    executor then stops the request's sequence, and drops its tokens that are still in the graph.
    """

    function: UserFunction
    encode: EncodeText | None

    @property
    def initial(self) -> None:
        return None

    def on(self, state: None, happened: Input, now: float, draw: Draw) -> Step[None]:
        match happened:
            case Arrival(item=item):
                return Step(None, (self._mapped(item, now),))
        return Step(None)

    def _mapped(self, item: Item, now: float) -> OperatorOutput:
        try:
            return Emit(apply_result(self.function, item, self.function(item), self.encode))
        except Exception as error:
            why = self.function.explain(error)
            return Terminate(failure_event(item, why, now=now), error)


class AsyncMap:
    """Calls an async function on each item, with up to `concurrency` calls at a time. An item may
    overtake another item whose call takes longer.

    Token events must keep their order: they need `concurrency: 1`, or a `collect` before this
    operator, or else their request fails. Cancelling a request cancels its call.
    """

    holds = False

    def __init__(self, function: UserFunction, encode: EncodeText | None, concurrency: int) -> None:
        self.concurrency = concurrency
        self._function = function
        self._encode = encode

    def capacity(self, facts: EngineFacts | None) -> Credit:
        """Credit for `concurrency` items. Further items wait upstream, where their order can still
        change.
        """
        return Credit(requests=self.concurrency)

    async def on_item(self, ctx: Context, item: Item) -> None:
        if isinstance(item, TokenEvent) and self.concurrency > 1:
            return await ctx.terminate(
                end_event(item, "failed", now=ctx.now(), error=_unordered(ctx))
            )
        try:
            answered = await self._function.wait(item)
            result = apply_result(self._function, item, answered, self._encode)
        except Exception as error:
            why = self._function.explain(error)
            return await ctx.terminate(failure_event(item, why, now=ctx.now()), error)
        await ctx.emit(result)

    async def on_events(self, ctx: Context, events: tuple[EngineEvent, ...]) -> None:
        """Do nothing: the operator has no engine."""

    def on_signal(self, ctx: Context, signal: Signal) -> None:
        """Do nothing: the executor cancels the call."""

    def recall(self, ctx: Context, key: tuple[str, int]) -> Request | None:
        """Return None: the operator has no engine."""
        return None

    def discard(self, ctx: Context, item: Item) -> None:
        """Do nothing: the operator holds nothing of an item."""


def _unordered(ctx: Context) -> str:
    return (
        f"{ctx.name}: calls of an async function overtake each other, and tokens must not: "
        "set concurrency: 1, or put collect before it"
    )


def build(options: MapOptions, setup: Setup) -> Map | AsyncMap:
    """Make an AsyncMap for an async function, and a Map for a plain function.

    Raises ValueError for an unknown function, and if `concurrency` is given for a plain function.
    """
    function = find_function(setup, options.function)
    if function.is_async:
        return AsyncMap(function, setup.encode, options.concurrency or DEFAULT_CONCURRENCY)
    if options.concurrency is not None:
        raise ValueError(
            f"{setup.name}: concurrency is of no use to {options.function}, which is not async: "
            "leave it out"
        )
    return Map(function, setup.encode)
