"""generate: runs prefill and decode in one engine, with chunked prefill in its decode batches."""

from dataclasses import dataclass, field

from sagellm.graphs.vocabulary import (
    EVENT,
    REQUEST,
    TEXT_IN,
    TEXT_OUT,
    TOKENS_IN,
    TOKENS_OUT,
    OpSpec,
    Port,
)
from sagellm.runtime.handover import (
    HeldRequests,
    check_needs,
    merge_stamps,
    refusal_event,
    report_first_token,
)
from sagellm.runtime.messages import Item, Request, TokenEvent
from sagellm.runtime.operator import Context, Credit, Setup, Signal
from sagellm.runtime.port import EngineEvent, EngineFacts, EngineRefusal


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """`max_inflight`: the most requests of one replica at a time; None: the engine's
    `max_num_seqs`.
    """

    engine: str
    max_inflight: int | None = field(default=None, metadata={"min": 1})


SPEC = OpSpec(
    "generate",
    inlets=(Port("in", REQUEST),),
    outlets=(Port("out", EVENT),),
    options=GenerateOptions,
    role="service",
    engine=True,
    needs=frozenset({f"{TOKENS_IN}|{TEXT_IN}", f"{TOKENS_OUT}|{TEXT_OUT}"}),
)


class GenerateService:
    """Submits requests to the engine and emits their tokens. Keeps each request until it ends: the
    core recalls requests of an engine that was lost.
    """

    concurrency = 1  # requests reach the engine in the order in which they arrive
    holds = True

    def __init__(self, options: GenerateOptions) -> None:
        self._options = options
        self._held = HeldRequests()

    def capacity(self, facts: EngineFacts | None) -> Credit:
        if facts is None:
            return Credit()
        return Credit(
            requests=self._options.max_inflight or facts.max_num_seqs,
            blocks=facts.num_token_blocks,
        )

    async def on_item(self, ctx: Context, item: Item) -> None:
        assert isinstance(item, Request)
        self._held.add(item)  # before `submit`: events may come while it waits
        try:
            check_needs(item, ctx.engine.facts)
            await ctx.engine.submit(item.sequence(ctx.name))
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
        request = self._held.note(event)
        if request is not None:
            report_first_token(ctx, request, event)
        if event.finish_reason is not None:
            ctx.release(event.key)

    def _stamped(self, event: EngineEvent) -> TokenEvent:
        """The event; the first and the last event of a sequence get the stamps of the request."""
        assert isinstance(event, TokenEvent)
        if event.finish_reason is None and event.position:
            return event
        request = self._held.get(event.key)
        return merge_stamps(request, event) if request is not None else event


def build(options: GenerateOptions, setup: Setup) -> GenerateService:
    return GenerateService(options)
