"""How a prefilled request gives up the KV blocks that are kept for it."""

import msgspec

from sagellm.runtime.engine.port import Engine
from sagellm.runtime.messages import Item, Prefilled, Request, Stamps, TokenEvent
from sagellm.runtime.operator import Context


def abandon(ctx: Context, item: Item) -> None:
    """Free the leases that an item carries, in whichever pools they are; twice does no harm."""
    if not isinstance(item, Prefilled):
        return
    for lease in (item.lease, item.landing):
        if lease is not None:
            engine: Engine = ctx.engine_named(lease.engine, lease.replica)
            engine.cancel(lease.request_id, lease.choice, lease.epoch)


def merge_stamps(request: Request, event: TokenEvent) -> TokenEvent:
    """The event with the stamps of the phases before its engine.

    What an earlier phase stamped stays: a decode engine starts a sequence that a prefill engine
    had started long before.
    """
    before = msgspec.structs.asdict(request.stamps)
    after = msgspec.structs.asdict(event.stamps)
    known = {name: value for name, value in before.items() if value is not None}
    return msgspec.structs.replace(event, stamps=Stamps(**{**after, **known}))
