"""prefill: computes the KV blocks and the first token of a prompt, after blocks have been reserved
in the decode pool.
"""

from dataclasses import dataclass, field

import msgspec

from sagellm.graphs.vocabulary import (
    KV_TRANSFER,
    PREFILLED,
    REQUEST,
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
    release_leases,
)
from sagellm.runtime.messages import Item, Prefilled, Request, TokenEvent
from sagellm.runtime.operator import Context, Credit, Setup, Signal, Target
from sagellm.runtime.port import (
    EngineEvent,
    EngineFacts,
    EngineRefusal,
    KVTarget,
    LeaseOffer,
    PrefillDone,
    kv_engine,
)


@dataclass(frozen=True, slots=True)
class PrefillOptions:
    """`max_inflight`: the most requests of one replica at a time.

    A small number keeps other requests in `policy_sort`, where their order can still change. More
    than one request lets the engine start the next prompt as soon as it finishes the previous
    prompt.
    """

    engine: str
    max_inflight: int = field(default=8, metadata={"min": 1})


SPEC = OpSpec(
    "prefill",
    inlets=(Port("in", REQUEST),),
    outlets=(Port("out", PREFILLED),),
    options=PrefillOptions,
    role="service",
    engine=True,
    needs=frozenset({TOKENS_IN, TOKENS_OUT, KV_TRANSFER}),
)


class PrefillService:
    """Reserves blocks in the decode pool, and then submits the prompt to the prefill engine. That
    engine keeps the computed blocks for the transfer.
    """

    holds = True

    def __init__(self, options: PrefillOptions, setup: Setup) -> None:
        self.concurrency = options.max_inflight  # all requests may wait for a reservation at once
        self._options = options
        self._decode: Target | None = next(iter(setup.targets), None)
        self._held = HeldRequests()
        self._reservations: dict[tuple[str, int], KVTarget] = {}

    def capacity(self, facts: EngineFacts | None) -> Credit:
        return Credit(requests=self._options.max_inflight)

    async def on_item(self, ctx: Context, item: Item) -> None:
        assert isinstance(item, Request)
        try:
            check_needs(item, ctx.engine.facts)
            await self._reserve(ctx, item)
            self._held.add(item)
            await ctx.engine.submit(item.sequence(ctx.name, hold_kv=True))
        except EngineRefusal as error:
            self.discard(ctx, item)
            ctx.release(item.key)
            await ctx.terminate(refusal_event(item, error, ctx.now()))

    async def on_events(self, ctx: Context, events: tuple[EngineEvent, ...]) -> None:
        for event in events:
            if isinstance(event, PrefillDone):
                await self._pass_on(ctx, event)
            elif isinstance(event, TokenEvent) and event.is_last:
                await self._end(ctx, event)

    def on_signal(self, ctx: Context, signal: Signal) -> None:
        self._held.cancel(ctx, signal)

    def recall(self, ctx: Context, key: tuple[str, int]) -> Request | None:
        request = self._held.get(key)
        if request is not None:
            self.discard(ctx, request)
        return request

    def discard(self, ctx: Context, item: Item) -> None:
        self._held.drop(item.key)
        reservation = self._reservations.pop(item.key, None)
        if reservation is not None:
            reservation.abort()
        release_leases(ctx, item)

    async def _reserve(self, ctx: Context, request: Request) -> None:
        """Reserve the request's blocks in the decode pool; wait until enough blocks are free. Where
        the same replica decodes, its blocks stay where they are.

        The reservation comes before the computation, so that computed blocks never wait for a full
        decode pool. Raises EngineRefusal.
        """
        if self._decode is None:
            return
        replica = request.placement.get(self._decode.node, ctx.replica)
        is_shared = self._decode.engine == self._options.engine
        if is_shared and replica == ctx.replica:
            return
        # The prefill of a resumed request includes the tokens that it has emitted already.
        offer = LeaseOffer(
            request_id=request.request_id,
            choice=request.choice,
            epoch=request.epoch,
            num_tokens=len(request.prompt_token_ids) + len(request.emitted_token_ids),
            layout_hash=ctx.engine.facts.layout_hash,
        )
        engine = kv_engine(ctx.engine_named(self._decode.engine, replica))
        self._reservations[request.key] = await engine.import_(offer)

    async def _pass_on(self, ctx: Context, done: PrefillDone) -> None:
        """Emit the prefilled request with its leases, and release its prefill credit."""
        request = self._held.get(done.first.key)
        assert request is not None
        self._held.drop(request.key)
        reservation = self._reservations.pop(request.key, None)
        if done.lease is None and reservation is not None:  # the first token was the last
            reservation.abort()
            reservation = None
        first = merge_stamps(request, done.first)
        prefilled = Prefilled(
            request=msgspec.structs.replace(request, stamps=first.stamps),
            first=first,
            lease=done.lease,
            reservation=reservation.lease if reservation else None,
        )
        await ctx.emit(prefilled)
        ctx.release(request.key)

    async def _end(self, ctx: Context, event: TokenEvent) -> None:
        """End a request whose sequence was cancelled or failed before its first token; free its
        reservation.
        """
        request = self._held.get(event.key)
        assert request is not None
        self.discard(ctx, request)
        ctx.release(request.key)
        await ctx.terminate(merge_stamps(request, event))


def build(options: PrefillOptions, setup: Setup) -> PrefillService:
    return PrefillService(options, setup)
