"""kv_transfer: copies a prompt's KV blocks from the prefill pool into the decode pool."""

from dataclasses import dataclass, field

import msgspec

from sagellm.graphs.vocabulary import PREFILLED, OpSpec, Port
from sagellm.runtime.engine.port import EngineEvent, EngineFacts, LeaseOffer
from sagellm.runtime.handover import abandon
from sagellm.runtime.messages import Item, LeaseRef, Prefilled, Request
from sagellm.runtime.operator import Context, Credit, Setup, Signal


@dataclass(frozen=True, slots=True)
class Options:
    """`max_inflight`: transfers under way at a time."""

    max_inflight: int = field(default=4, metadata={"min": 1})


SPEC = OpSpec(
    "kv_transfer",
    inlets=(Port("in", PREFILLED),),
    outlets=(Port("out", PREFILLED),),
    options=Options,
    role="service",
)


class KVTransfer:
    """Moves leases: source sending -> released, destination receiving -> filled."""

    holds = False

    def __init__(self, options: Options) -> None:
        self.concurrency = options.max_inflight
        self._options = options

    def capacity(self, facts: EngineFacts | None) -> Credit:
        return Credit(requests=self._options.max_inflight)

    async def on_item(self, ctx: Context, item: Item) -> None:
        assert isinstance(item, Prefilled)
        if item.lease is not None and item.landing is not None:
            landed = await self._transfer(ctx, item.lease, item.landing)
            stamps = msgspec.structs.replace(item.request.stamps, transferred_s=ctx.now())
            request = msgspec.structs.replace(item.request, stamps=stamps)
            item = msgspec.structs.replace(item, request=request, lease=None, landing=landed)
        await ctx.emit(item)

    async def on_events(self, ctx: Context, events: tuple[EngineEvent, ...]) -> None:
        raise AssertionError("kv_transfer has no engine of its own")

    def on_signal(self, ctx: Context, signal: Signal) -> None:
        """The executor cancels the transfer itself."""

    def recall(self, ctx: Context, key: tuple[str, int]) -> Request | None:
        """It has no engine of its own."""
        return None

    def discard(self, ctx: Context, item: Item) -> None:
        abandon(ctx, item)

    async def _transfer(self, ctx: Context, lease: LeaseRef, landing: LeaseRef) -> LeaseRef:
        """Copy, then acknowledge: the source is freed only once the destination holds all."""
        sender = ctx.engine_named(lease.engine, lease.replica)
        receiver = ctx.engine_named(landing.engine, landing.replica)
        offer = LeaseOffer(
            request_id=lease.request_id,
            choice=lease.choice,
            epoch=lease.epoch,
            num_tokens=lease.num_tokens,
            layout_hash=sender.facts.layout_hash,
        )
        target = await receiver.import_(offer)  # the reservation that prefill made
        source = sender.export(lease)
        try:
            await target.receive(source)
        finally:
            source.release()
        return target.lease


def build(options: Options, setup: Setup) -> KVTransfer:
    return KVTransfer(options)
