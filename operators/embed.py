"""embed: gives each request to an engine that embeds, and emits the vector of its text."""

from dataclasses import dataclass, field

import msgspec

from sagellm.graphs.vocabulary import EMBED, EMBEDDING, REQUEST, TOKENS_IN, OpSpec, Port
from sagellm.runtime.handover import HeldRequests, merge_stamps, refusal_event
from sagellm.runtime.messages import Item, Request, TokenEvent
from sagellm.runtime.operator import Context, Credit, Setup, Signal
from sagellm.runtime.port import EngineEvent, EngineFacts, EngineRefusal


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """`max_inflight`: the most texts of one replica at a time; None: the engine's
    `max_num_seqs`.
    """

    engine: str
    max_inflight: int | None = field(default=None, metadata={"min": 1})


SPEC = OpSpec(
    "embed",
    inlets=(Port("in", REQUEST),),
    outlets=(Port("out", EMBEDDING),),
    options=EmbedOptions,
    role="service",
    engine=True,
    needs=frozenset({TOKENS_IN, EMBED}),
)


class EmbedService:
    """Submits texts to the engine and emits their vectors. Keeps each request until it ends: the
    core recalls requests of an engine that was lost.
    """

    concurrency = 1  # requests reach the engine in the order in which they arrive
    holds = True

    def __init__(self, options: EmbedOptions) -> None:
        self._options = options
        self._held = HeldRequests()

    def capacity(self, facts: EngineFacts | None) -> Credit:
        if facts is None:
            return Credit()
        return Credit(requests=self._options.max_inflight or facts.max_num_seqs)

    async def on_item(self, ctx: Context, item: Item) -> None:
        assert isinstance(item, Request)
        self._held.add(item)  # before `submit`: events may come while it waits
        try:
            state = msgspec.structs.replace(item.sequence(ctx.name), task="embed")
            await ctx.engine.submit(state)
        except EngineRefusal as error:
            self._held.drop(item.key)
            ctx.release(item.key)
            await ctx.terminate(refusal_event(item, error, ctx.now()))

    async def on_events(self, ctx: Context, events: tuple[EngineEvent, ...]) -> None:
        await ctx.emit_batch(map(self._stamped, events), self._note)

    def on_signal(self, ctx: Context, signal: Signal) -> None:
        self._held.cancel(ctx, signal)

    def recall(self, ctx: Context, key: tuple[str, int]) -> Request | None:
        return self._held.recall(key)

    def discard(self, ctx: Context, item: Item) -> None:
        self._held.drop(item.key)

    def _note(self, ctx: Context, event: TokenEvent) -> None:
        self._held.note(event)
        ctx.release(event.key)  # a text has a single event

    def _stamped(self, event: EngineEvent) -> TokenEvent:
        assert isinstance(event, TokenEvent)
        request = self._held.get(event.key)
        return merge_stamps(request, event) if request is not None else event


def build(options: EmbedOptions, setup: Setup) -> EmbedService:
    return EmbedService(options)
