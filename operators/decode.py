"""decode: decodes sequences whose prompts another engine has computed, in continuous batches."""

from dataclasses import dataclass, field

import msgspec

from sagellm.graphs.vocabulary import (
    EVENT,
    KV_TRANSFER,
    PREFILLED,
    RESUME,
    TOKENS_IN,
    TOKENS_OUT,
    OpSpec,
    Port,
)
from sagellm.runtime.handover import (
    HeldRequests,
    merge_stamps,
    refusal_event,
    release_leases,
    report_first_token,
)
from sagellm.runtime.messages import Item, Prefilled, Request, TokenEvent
from sagellm.runtime.operator import Context, Credit, Setup, Signal
from sagellm.runtime.port import EngineEvent, EngineFacts, EngineRefusal


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """`max_inflight`: the most requests of one replica at a time, each counted from its entry into
    prefill until its end.

    None: 9/8 of the engine's `max_num_seqs`. The extra eighth is in prefill or transfer while the
    other requests decode.
    """

    engine: str
    max_inflight: int | None = field(default=None, metadata={"min": 1})


SPEC = OpSpec(
    "decode",
    inlets=(Port("in", PREFILLED),),
    outlets=(Port("out", EVENT),),
    options=DecodeOptions,
    role="service",
    engine=True,
    needs=frozenset({TOKENS_IN, TOKENS_OUT, KV_TRANSFER, RESUME}),
)


class DecodeService:
    """Emits the first token, and then submits the sequence to the decode engine, which continues
    from the transferred blocks.
    """

    concurrency = 1  # requests reach the engine in the order in which they arrive
    holds = True

    def __init__(self, options: DecodeOptions) -> None:
        self._options = options
        self._held = HeldRequests()

    def capacity(self, facts: EngineFacts | None) -> Credit:
        """The credit of one replica. The core spends this credit when a request enters prefill, so
        that requests that the decode replica has no room for wait in `policy_sort`.
        """
        if facts is None:
            return Credit()
        num_seqs = facts.max_num_seqs
        return Credit(
            requests=self._options.max_inflight or num_seqs + max(num_seqs // 8, 1),
            blocks=facts.num_token_blocks,
        )

    async def on_item(self, ctx: Context, item: Item) -> None:
        assert isinstance(item, Prefilled)
        request, first = item.request, item.first
        await ctx.emit(msgspec.structs.replace(first, stamps=_stamps(item)))
        report_first_token(ctx, request, first)
        if first.is_last:  # nothing is left to decode, and no lease is held
            ctx.release(request.key)
            return
        emitted = (*request.emitted_token_ids, *first.token_ids)
        request = msgspec.structs.replace(request, emitted_token_ids=emitted)
        self._held.add(request)
        try:
            # Without a transfer, prefill ran in this same engine, and its own lease continues.
            await ctx.engine.submit(
                request.sequence(ctx.name, lease=item.reservation or item.lease)
            )
        except EngineRefusal as error:
            self.discard(ctx, item)
            ctx.release(request.key)
            await ctx.terminate(refusal_event(request, error, ctx.now()))

    async def on_events(self, ctx: Context, events: tuple[EngineEvent, ...]) -> None:
        await ctx.emit_batch(map(self._stamped, events), self._note)

    def on_signal(self, ctx: Context, signal: Signal) -> None:
        self._held.cancel(ctx, signal)

    def recall(self, ctx: Context, key: tuple[str, int]) -> Request | None:
        return self._held.recall(key)

    def discard(self, ctx: Context, item: Item) -> None:
        self._held.drop(item.key)
        release_leases(ctx, item)

    def _note(self, ctx: Context, event: TokenEvent) -> None:
        self._held.note(event)
        if event.finish_reason is not None:
            ctx.release(event.key)

    def _stamped(self, event: EngineEvent) -> TokenEvent:
        assert isinstance(event, TokenEvent)
        if event.finish_reason is None:
            return event
        request = self._held.get(event.key)
        return merge_stamps(request, event) if request is not None else event


def _stamps(item: Prefilled) -> object:
    """The stamps of the first token's event. If this token is also the last, they are the event's
    own stamps, which include the time of the end; otherwise the request's, with the time of the
    transfer.
    """
    return item.first.stamps if item.first.is_last else item.request.stamps


def build(options: DecodeOptions, setup: Setup) -> DecodeService:
    return DecodeService(options)
