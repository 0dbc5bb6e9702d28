"""Drives an engine through its port, as the operators of a graph would."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import trio

from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.runtime.engine.runner import Runner
from sagellm.runtime.messages import LeaseRef, SequenceState, TokenEvent
from sagellm.runtime.port import LeaseOffer, PrefillDone
from sagellm.runtime.sampling import Sampling

OWNER = "test"


def put_runner(engine: LocalEngine, runner: Runner) -> None:
    """Compute with that runner from now on."""
    loop = engine._loop
    engine._resources = loop._resources = replace(engine._resources, runner=runner)


@dataclass
class Reply:
    """The events of one sequence, gathered."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    last: TokenEvent | None = None
    lease: LeaseRef | None = None
    events: list[TokenEvent] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)


class Driver:
    """Submits sequences and gathers their events. `replies`: by request id and choice."""

    def __init__(self, engine: LocalEngine, owner: str = OWNER) -> None:
        self.engine = engine
        self.owner = owner
        self.replies: dict[tuple[str, int], Reply] = {}

    async def submit(self, request_id: str, prompt: Sequence[int], **fields: object) -> Reply:
        sampling = fields.pop("sampling", None) or Sampling(
            max_tokens=fields.pop("max_tokens", 16), ignore_eos=True, seed=7
        )
        state = SequenceState(
            owner=self.owner,
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            **fields,
        )
        reply = self.replies[state.key] = Reply()
        await self.engine.submit(state)
        return reply

    async def read(self) -> None:
        async for batch in self.engine.events(self.owner):
            for event in batch:
                self._take(event)

    def _take(self, event: TokenEvent | PrefillDone) -> None:
        token = event.first if isinstance(event, PrefillDone) else event
        reply = self.replies[token.key]
        assert reply.last is None
        assert token.position == (reply.events[0].position if reply.events else token.position) + (
            len(reply.token_ids)
        )
        reply.events.append(token)
        reply.token_ids += token.token_ids
        reply.text += token.text
        if isinstance(event, PrefillDone):
            reply.lease = event.lease
        if token.is_last:
            reply.last = token
        if token.is_last or isinstance(event, PrefillDone):
            reply.done.set()

    async def at_rest(self) -> None:
        """Wait for a step whose sequences may have ended already; then every block is free."""
        with trio.fail_after(10):
            await self.engine.idle()
        assert self.engine.pool.num_leased == 0

    async def all_done(self) -> None:
        for reply in self.replies.values():
            await reply.done.wait()


@asynccontextmanager
async def running(*engines: LocalEngine) -> AsyncIterator[list[Driver]]:
    """Run engines, each with a driver. At the end they are at rest, with every block free."""
    drivers = [Driver(engine) for engine in engines]
    async with trio.open_nursery() as nursery:
        for driver in drivers:
            nursery.start_soon(driver.engine.run)
            nursery.start_soon(driver.read)
        yield drivers
        for driver in drivers:
            driver.engine.pool.check()
            await driver.at_rest()
        nursery.cancel_scope.cancel()


async def hand_over(
    source: Driver, target: Driver, request_id: str, prompt: Sequence[int], **fields: object
) -> tuple[Reply, Reply]:
    """Prefill in one engine, copy the blocks, decode in the other. Return both replies."""
    offer = LeaseOffer(
        request_id=request_id,
        choice=0,
        epoch=0,
        num_tokens=len(prompt),
        layout_hash=source.engine.facts.layout_hash,
    )
    reservation = await target.engine.import_(offer)
    first = await source.submit(request_id, prompt, hold_kv=True, **fields)
    await first.done.wait()
    if first.lease is None:
        reservation.abort()
        return first, first
    sender = source.engine.export(first.lease)
    try:
        await reservation.receive(sender)
    finally:
        sender.release()
    emitted = tuple(first.token_ids)
    rest = await target.submit(
        request_id, prompt, lease=reservation.lease, emitted_token_ids=emitted, **fields
    )
    await rest.done.wait()
    return first, rest
