"""The engine operators: their calls of engines, and what they free when a request ends."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from sagellm.operators import decode, generate, kv_transfer, prefill
from sagellm.runtime.feedback import KVMoved
from sagellm.runtime.messages import LeaseRef, Prefilled, Request, Stamps, TokenEvent
from sagellm.runtime.operator import Setup, Signal, Target
from sagellm.runtime.port import (
    DamagedBlocks,
    EngineFacts,
    EngineRefusal,
    LeaseOffer,
    PrefillDone,
    StaleLease,
)

FINE = Exception()  # none
FACTS = EngineFacts(
    "m",
    1024,
    8,
    frozenset({"kv_transfer"}),
    block_size=16,
    num_blocks=100,
    layout_hash="layout",
)


def lease(engine: str) -> LeaseRef:
    return LeaseRef(
        engine=engine, replica=0, lease_id=1, request_id="r", choice=0, epoch=3, num_tokens=4
    )


@dataclass
class Blocks:
    """A reservation that records how it ends."""

    lease: LeaseRef
    log: list[str]
    error: Exception | None = FINE

    async def receive(self, source: Any) -> None:
        if self.error is None:
            await trio.sleep_forever()
        elif self.error is not FINE:
            raise self.error
        self.log.append("received")
        if "break" in self.log:
            raise RuntimeError

    def abort(self) -> None:
        self.log.append("aborted")

    def release(self) -> None:
        self.log.append("released")


@dataclass
class Engine:
    """An engine that records its calls, and refuses requests if told to."""

    name: str
    log: list[str] = field(default_factory=list)
    refuses: bool = False
    facts: EngineFacts = FACTS
    submitted: list[Any] = field(default_factory=list)
    error: Exception | None = FINE  # of what is received; None: it never ends

    async def submit(self, state: Any) -> None:
        if self.refuses:
            raise EngineRefusal("too long")
        self.submitted.append(state)

    def cancel(self, request_id: str, choice: int, epoch: int) -> None:
        self.log.append(f"cancel {request_id} {choice} {epoch}")

    def export(self, source: LeaseRef) -> Blocks:
        return Blocks(source, self.log)

    async def import_(self, offer: LeaseOffer) -> Blocks:
        self.log.append(f"reserve {offer.num_tokens}")
        return Blocks(lease(self.name), self.log, self.error)


class Context:
    """A context of two engines that records what was emitted."""

    name, replica = "op", 0

    def __init__(self, **refuses: bool) -> None:
        self.reported: list[Any] = []
        self.engines = {name: Engine(name, refuses=refuses.get(name, False)) for name in "pd"}
        self.engine = self.engines["p"]
        self.sent: list[Any] = []
        self.ended: list[TokenEvent] = []
        self.released: list[tuple[str, int]] = []
        self.untransferred: list[tuple[tuple[str, int], bool]] = []

    def engine_named(self, name: str, replica: int) -> Engine:
        return self.engines[name]

    def not_transferred(self, item: Any, *, has_failed: bool) -> None:
        self.untransferred.append((item.key, has_failed))

    def now(self) -> float:
        return 9.0

    def fail_after(self, seconds: float) -> Any:
        return trio.fail_after(seconds)

    async def emit(self, item: Any, outlet: str = "out") -> None:
        self.sent.append(item)

    async def emit_batch(self, items: Any, done: Any) -> None:
        for item in items:
            self.sent.append(item)
            done(self, item)

    async def terminate(self, event: TokenEvent, cause: Exception | None = None) -> None:
        self.ended.append(event)

    def report(self, feedback: Any) -> None:
        self.reported.append(feedback)

    def release(self, key: tuple[str, int]) -> None:
        self.released.append(key)


REQUEST = Request(
    request_id="r", epoch=3, prompt_token_ids=(1, 2, 3, 4), stamps=Stamps(arrived_s=1.0)
)
FIRST = TokenEvent(request_id="r", token_ids=(7,), stamps=Stamps(started_s=2.0, prefilled_s=3.0))
LAST = TokenEvent(request_id="r", position=1, token_ids=(8,), finish_reason="stop")
ENDED = TokenEvent(request_id="r", finish_reason="cancelled")
SPLIT = Setup("prefill", targets=(Target("decode", 1, "d"),))


def prefilled(**changes: Any) -> Prefilled:
    known = {"request": REQUEST, "first": FIRST, "lease": lease("p"), "reservation": lease("d")}
    return Prefilled(**{**known, **changes})


async def test_prefill_reserves_where_it_will_decode_before_it_computes() -> None:
    ctx: Any = Context()
    await prefill.build(prefill.PrefillOptions("p"), SPLIT).on_item(ctx, REQUEST)
    assert ctx.engines["d"].log == ["reserve 4"]
    (state,) = ctx.engine.submitted
    assert (state.hold_kv, state.owner) == (True, "op")


async def test_prefill_hands_on_both_leases() -> None:
    ctx: Any = Context()
    operator = prefill.build(prefill.PrefillOptions("p"), SPLIT)
    await operator.on_item(ctx, REQUEST)
    await operator.on_events(ctx, (PrefillDone(first=FIRST, lease=lease("p")),))
    (item,) = ctx.sent
    assert (item.lease, item.reservation) == (lease("p"), lease("d"))
    assert item.request.stamps == Stamps(arrived_s=1.0, started_s=2.0, prefilled_s=3.0)
    assert ctx.released == [("r", 0)]


async def test_a_first_token_that_is_the_last_needs_no_landing() -> None:
    ctx: Any = Context()
    operator = prefill.build(prefill.PrefillOptions("p"), SPLIT)
    await operator.on_item(ctx, REQUEST)
    await operator.on_events(ctx, (PrefillDone(first=LAST, lease=None),))
    assert ctx.engines["d"].log == ["reserve 4", "aborted"]
    assert ctx.sent[0].reservation is None


async def test_a_refused_prefill_gives_its_reservation_back() -> None:
    ctx: Any = Context(p=True)
    await prefill.build(prefill.PrefillOptions("p"), SPLIT).on_item(ctx, REQUEST)
    assert ctx.engines["d"].log == ["reserve 4", "aborted"]
    assert (ctx.ended[0].finish_reason, ctx.ended[0].error) == ("refused", "too long")


async def test_a_cancelled_prefill_gives_its_reservation_back() -> None:
    ctx: Any = Context()
    operator = prefill.build(prefill.PrefillOptions("p"), SPLIT)
    await operator.on_item(ctx, REQUEST)
    operator.on_signal(ctx, Signal("cancel", "r"))
    assert ctx.engine.log == ["cancel r 0 3"]
    await operator.on_events(ctx, (ENDED,))
    assert ctx.engines["d"].log == ["reserve 4", "aborted"]
    assert [event.finish_reason for event in ctx.ended] == ["cancelled"]


async def test_prefill_and_decode_of_one_engine_need_no_reservation() -> None:
    ctx: Any = Context()
    shared = Setup("prefill", targets=(Target("decode", 1, "p"),))
    await prefill.build(prefill.PrefillOptions("p"), shared).on_item(ctx, REQUEST)
    assert ctx.engines["d"].log == []


async def test_a_transfer_frees_the_source_once_the_destination_has_all() -> None:
    ctx: Any = Context()
    await kv_transfer.build(kv_transfer.KVTransferOptions(), Setup("t")).on_item(ctx, prefilled())
    assert ctx.engines["p"].log == ["released"]
    assert ctx.engines["d"].log == ["reserve 4", "received"]
    (item,) = ctx.sent
    assert (item.lease, item.reservation, item.request.stamps.transferred_s) == (
        None,
        lease("d"),
        9.0,
    )
    assert ctx.reported == [KVMoved(num_tokens=4, seconds=0.0)]


async def test_a_broken_transfer_frees_the_source() -> None:
    ctx: Any = Context()
    ctx.engines["d"].log.append("break")
    with pytest.raises(RuntimeError):
        await kv_transfer.build(kv_transfer.KVTransferOptions(), Setup("t")).on_item(
            ctx, prefilled()
        )
    assert ctx.engines["p"].log == ["released"]


@pytest.mark.parametrize("error", [DamagedBlocks("x"), StaleLease("x"), None])
async def test_blocks_that_do_not_come_are_computed_where_they_are_decoded(
    error: Exception | None, autojump_clock: MockClock
) -> None:
    """Damaged, missing or late blocks: both leases are freed; the item goes on without blocks."""
    ctx: Any = Context()
    ctx.engines["d"].error = error
    late = Request(request_id="r", prompt_token_ids=(1, 2, 3, 4), epoch=3)
    transfer = kv_transfer.build(kv_transfer.KVTransferOptions(), Setup("t"))
    await transfer.on_item(ctx, prefilled(request=late))
    (item,) = ctx.sent
    assert (item.lease, item.reservation, item.request.stamps.transferred_s) == (None, None, None)
    assert ctx.engines["p"].log == ["released", "cancel r 0 3"]
    assert ctx.engines["d"].log == ["reserve 4", "cancel r 0 3"]
    assert ctx.untransferred == [(("r", 0), True)]


async def test_a_lease_that_ended_goes_in_again_the_first_times() -> None:
    ctx: Any = Context()
    ctx.engines["d"].error = StaleLease("x")
    first = Request(request_id="r", prompt_token_ids=(1, 2, 3, 4), epoch=0)
    transfer = kv_transfer.build(kv_transfer.KVTransferOptions(), Setup("t"))
    with pytest.raises(StaleLease):
        await transfer.on_item(ctx, prefilled(request=first))
    assert ctx.untransferred == []


async def test_a_link_that_fails_is_not_tried_by_everybody() -> None:
    ctx: Any = Context()
    ctx.engines["d"].error = DamagedBlocks("x")
    transfer = kv_transfer.build(kv_transfer.KVTransferOptions(), Setup("t"))
    for _ in range(9):
        await transfer.on_item(ctx, prefilled())
    assert [failed for _, failed in ctx.untransferred] == [True] * 5 + [False] * 4
    assert len(ctx.sent) == 9


async def test_nothing_is_transferred_for_a_request_that_has_ended() -> None:
    ctx: Any = Context()
    ended = prefilled(lease=None, reservation=None, first=LAST)
    await kv_transfer.build(kv_transfer.KVTransferOptions(), Setup("t")).on_item(ctx, ended)
    assert ctx.sent == [ended]


@pytest.mark.parametrize("module", [kv_transfer, decode])
def test_a_discarded_item_frees_both_leases(module: Any) -> None:
    ctx: Any = Context()
    options = (
        kv_transfer.KVTransferOptions() if module is kv_transfer else decode.DecodeOptions("d")
    )
    module.build(options, Setup("op")).discard(ctx, prefilled())
    assert ctx.engines["p"].log == ctx.engines["d"].log == ["cancel r 0 3"]


async def test_decode_goes_on_behind_the_first_token() -> None:
    ctx: Any = Context()
    await decode.build(decode.DecodeOptions("d"), Setup("op")).on_item(ctx, prefilled(lease=None))
    assert [event.token_ids for event in ctx.sent] == [(7,)]
    (state,) = ctx.engine.submitted
    assert (state.emitted_token_ids, state.lease) == ((7,), lease("d"))


async def test_decode_of_an_ended_request_only_says_so() -> None:
    ctx: Any = Context()
    ended = prefilled(lease=None, reservation=None, first=LAST)
    await decode.build(decode.DecodeOptions("d"), Setup("op")).on_item(ctx, ended)
    assert ctx.sent[0].is_last
    assert ctx.engine.submitted == []
    assert ctx.released == [("r", 0)]


@pytest.mark.parametrize(
    ("module", "options"),
    [(generate, generate.GenerateOptions("p")), (decode, decode.DecodeOptions("p"))],
)
async def test_credit_comes_back_with_the_last_event(module: Any, options: Any) -> None:
    ctx: Any = Context()
    operator = module.build(options, Setup("op"))
    await operator.on_item(ctx, REQUEST if module is generate else prefilled())
    await operator.on_events(ctx, (FIRST,))
    assert ctx.released == []
    await operator.on_events(ctx, (LAST,))
    assert ctx.released == [("r", 0)]
    assert ctx.sent[-1].stamps.arrived_s == 1.0


async def test_a_refused_request_is_told_why() -> None:
    ctx: Any = Context(p=True)
    await generate.build(generate.GenerateOptions("p"), Setup("op")).on_item(ctx, REQUEST)
    assert ctx.ended[0].error == "too long"
    assert ctx.released == [("r", 0)]


def test_generate_takes_as_many_as_its_engine_runs() -> None:
    operator = generate.build(generate.GenerateOptions("p"), Setup("op"))
    assert operator.capacity(FACTS).requests == 8
    assert operator.capacity(FACTS).blocks == 100
    small = generate.build(generate.GenerateOptions("p", max_inflight=2), Setup("op"))
    assert small.capacity(FACTS).requests == 2
