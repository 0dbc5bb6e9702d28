"""kv_transfer: copies a prompt's KV blocks from the prefill pool into the decode pool."""

from dataclasses import dataclass, field

import msgspec
import trio

from sagellm.graphs.log import get_logger
from sagellm.graphs.vocabulary import PREFILLED, OpSpec, Port
from sagellm.runtime.feedback import KVMoved
from sagellm.runtime.handover import release_leases
from sagellm.runtime.kv.transport import CircuitBreaker
from sagellm.runtime.messages import Item, LeaseRef, Prefilled, Request
from sagellm.runtime.operator import Context, Credit, Setup, Signal
from sagellm.runtime.port import (
    DamagedBlocks,
    EngineEvent,
    EngineFacts,
    LeaseOffer,
    StaleLease,
    kv_engine,
)

log = get_logger("sagellm.kv")

# A stale lease may mean that a worker died: the request then goes back to the queue in its next
# epoch, where a transfer may succeed. From this epoch on, the decode engine computes the prompt
# itself: a request must not be queued again and again.
_PATIENT_EPOCHS = 3


@dataclass(frozen=True, slots=True)
class KVTransferOptions:
    """`max_inflight`: the most concurrent transfers. `max_transfer_s`: the timeout of a transfer.

    If a transfer fails or times out, the decode engine computes the prompt itself.
    """

    max_inflight: int = field(default=4, metadata={"min": 1})
    max_transfer_s: float = field(default=10.0, metadata={"min": 1e-3})


SPEC = OpSpec(
    "kv_transfer",
    inlets=(Port("in", PREFILLED),),
    outlets=(Port("out", PREFILLED),),
    options=KVTransferOptions,
    role="service",
)


class KVTransferService:
    """Copies the blocks of a prefilled request from its lease to its reservation. The source lease
    ends as released, the destination lease as filled.
    """

    holds = False

    def __init__(self, options: KVTransferOptions) -> None:
        self.concurrency = options.max_inflight
        self._options = options
        self._links = CircuitBreaker()

    def capacity(self, facts: EngineFacts | None) -> Credit:
        return Credit(requests=self._options.max_inflight)

    async def on_item(self, ctx: Context, item: Item) -> None:
        assert isinstance(item, Prefilled)
        if item.lease is not None and item.reservation is not None:
            item = await self._moved(ctx, item, item.lease, item.reservation)
        await ctx.emit(item)

    async def on_events(self, ctx: Context, events: tuple[EngineEvent, ...]) -> None:
        raise AssertionError("kv_transfer has no engine of its own")

    def on_signal(self, ctx: Context, signal: Signal) -> None:
        """Do nothing: the executor cancels the task of the transfer."""

    def recall(self, ctx: Context, key: tuple[str, int]) -> Request | None:
        """Return None: the operator has no engine of its own."""
        return None

    def discard(self, ctx: Context, item: Item) -> None:
        release_leases(ctx, item)

    async def _moved(
        self, ctx: Context, item: Prefilled, lease: LeaseRef, reservation: LeaseRef
    ) -> Prefilled:
        """Transfer the item's blocks, and return the item with blocks in the decode pool. The item
        has no blocks if the transfer failed, or if the circuit breaker of the link is open.

        Raises EngineLost. Raises StaleLease before epoch `_PATIENT_EPOCHS`; the request is then
        queued again.
        """
        link = (lease.engine, lease.replica), (reservation.engine, reservation.replica)
        begun_s = ctx.now()
        if not self._links.begin(link, begun_s):
            return _without_blocks(ctx, item, has_failed=False)
        try:
            with ctx.fail_after(self._options.max_transfer_s):
                received = await self._transfer(ctx, lease, reservation)
        except (DamagedBlocks, StaleLease, trio.TooSlowError) as error:
            self._links.failed(link, ctx.now(), took_s=ctx.now() - begun_s)
            if isinstance(error, StaleLease) and item.request.epoch < _PATIENT_EPOCHS:
                raise
            log.warning("kv_transfer_failed", request_id=item.request_id, why=str(error) or "slow")
            return _without_blocks(ctx, item, has_failed=True)
        except BaseException:  # such as a cancel, which tells nothing about the link
            self._links.left(link)
            raise
        self._links.passed(link)
        took_s = ctx.now() - begun_s
        ctx.report(KVMoved(num_tokens=lease.num_tokens, seconds=took_s))
        stamps = msgspec.structs.replace(item.request.stamps, transferred_s=ctx.now())
        request = msgspec.structs.replace(item.request, stamps=stamps)
        return msgspec.structs.replace(item, request=request, lease=None, reservation=received)

    async def _transfer(self, ctx: Context, lease: LeaseRef, reservation: LeaseRef) -> LeaseRef:
        """Copy the blocks, and return the destination lease. Release the source lease at the end,
        also after a failure.
        """
        sender = kv_engine(ctx.engine_named(lease.engine, lease.replica))
        receiver = kv_engine(ctx.engine_named(reservation.engine, reservation.replica))
        offer = LeaseOffer(
            request_id=lease.request_id,
            choice=lease.choice,
            epoch=lease.epoch,
            num_tokens=lease.num_tokens,
            layout_hash=sender.facts.layout_hash,
        )
        target = await receiver.import_(offer)  # finds the reservation that `prefill` made
        source = sender.export(lease)
        try:
            await target.receive(source)
        finally:
            source.release()
        return target.lease


def _without_blocks(ctx: Context, item: Prefilled, *, has_failed: bool) -> Prefilled:
    """Free the leases of an item, and return the item without them. The decode engine then computes
    the prompt itself. `has_failed`: a transfer was tried.
    """
    ctx.not_transferred(item, has_failed=has_failed)
    release_leases(ctx, item)
    return msgspec.structs.replace(item, lease=None, reservation=None)


def build(options: KVTransferOptions, setup: Setup) -> KVTransferService:
    return KVTransferService(options)
