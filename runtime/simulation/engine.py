"""A modelled engine behind the engine port, in simulated time."""

from dataclasses import dataclass

from sagellm.runtime.engine.costs.profile import HostCost
from sagellm.runtime.engine.engine_model import EngineModel
from sagellm.runtime.engine.step_cost import SequenceProgress
from sagellm.runtime.messages import (
    ChoiceKey,
    EngineReplica,
    FinishReason,
    LeaseRef,
    SequenceState,
    Stamps,
    TokenEvent,
)
from sagellm.runtime.port import (
    EngineEvent,
    EngineFacts,
    EngineHealth,
    EngineLoad,
    EngineLost,
    EngineRefusal,
    LeaseOffer,
    LossCause,
    Lost,
    PrefillDone,
    StaleLease,
)
from sagellm.runtime.prefixes import OnCacheChanged
from sagellm.runtime.simulation.cache_reports import CacheReports
from sagellm.runtime.simulation.host_times import HostTimes, SimulatedMailbox
from sagellm.runtime.simulation.links import Links
from sagellm.runtime.simulation.prompts import PromptHasher, TracePrompt
from sagellm.runtime.simulation.timeline import SimulatedFlag, Timeline
from sagellm.runtime.simulation.transfers import SimulatedSource, SimulatedTarget

_FIRST = (0,)  # the id of every first token: simulated tokens are only counted


@dataclass(slots=True)
class _Open:
    """A sequence in the engine. `num_emitted`: its tokens so far, those of earlier engines too.
    `most`: the tokens of its answer. `is_held`: its blocks are held after its first token.
    `has_entered`: whether the host has given it to the engine. `prefilled_s`: the time of its first
    token.
    """

    state: SequenceState
    num_prompt: int
    num_emitted: int
    most: int
    is_held: bool
    has_entered: bool = False
    prefilled_s: float | None = None


class SimulatedEngine:
    """Implements the engine port over an `EngineModel`."""

    def __init__(
        self,
        timeline: Timeline,
        facts: EngineFacts,
        model: EngineModel,
        place: EngineReplica,
        *,
        links: Links,
        hasher: PromptHasher,
        host: HostCost | None = None,
    ) -> None:
        self.facts = facts
        self.place = place
        self.model = model
        self._timeline = timeline
        self._links = links
        self._hasher = hasher
        self._host = HostTimes(timeline, host)
        self._mailboxes: dict[str, SimulatedMailbox] = {}
        self._open: dict[ChoiceKey, _Open] = {}
        self._held: dict[ChoiceKey, LeaseRef] = {}
        self._targets: dict[ChoiceKey, SimulatedTarget] = {}
        self._granting: dict[ChoiceKey, SimulatedFlag] = {}
        self._due_s = float("inf")
        self._is_up = True
        self._reports = CacheReports(place, facts.block_size, hasher)

    # ---- the port ----------------------------------------------------------------------------

    async def submit(self, state: SequenceState) -> None:
        self._check_up()
        key, num_emitted = state.key, state.num_emitted
        num_prompt = len(state.prompt_token_ids)
        most = min(state.sampling.max_tokens, self.facts.max_model_len - num_prompt)
        if key in self._open:
            raise EngineRefusal(f"choice {state.choice} of {state.request_id} runs here already")
        if most < 1:
            raise EngineRefusal(
                f"the prompt has {num_prompt} tokens, and with its answer at most "
                f"{self.facts.max_model_len} fit the engine"
            )
        if state.lease is not None and self._claim(key, state.lease) is None:
            raise StaleLease(f"the lease of request {state.request_id} is gone")
        is_held = state.hold_kv and most > num_emitted + 1
        opened = self._open[key] = _Open(state, num_prompt, num_emitted, most, is_held)
        if num_emitted >= most:
            self._end_before(opened, "length")
        else:
            self._host.enter(num_prompt, lambda: self._enter(opened))

    def _enter(self, opened: _Open) -> None:
        """Queue a sequence, unless it has ended while the host was at it."""
        state, prompt = opened.state, opened.state.prompt_token_ids
        if self._open.get(state.key) is not opened:
            return
        opened.has_entered = True
        keys: tuple[bytes, ...] = ()
        if self.model.blocks.span and isinstance(prompt, TracePrompt):
            keys = self._hasher.keys(prompt, self.facts.block_size)
        self.model.submit(
            state.key,
            self._timeline.now,
            num_prompt=opened.num_prompt,
            num_output=opened.num_emitted + 1 if state.hold_kv else opened.most,
            num_emitted=opened.num_emitted,
            priority=state.priority,
            keys=keys,
            holds=opened.is_held,
        )
        self._settle()

    def _end_before(self, opened: _Open, reason: FinishReason) -> None:
        """End a sequence that is not in the engine, and free the blocks of its lease."""
        key, now = opened.state.key, self._timeline.now
        self.model.release(key, now)
        self._settle()
        self._deliver([SequenceProgress(key, 0, now, reason)])

    def cancel(self, request_id: str, choice: int, epoch: int) -> None:
        key = request_id, choice
        opened = self._open.get(key)
        if opened is not None and opened.state.epoch == epoch:
            if opened.has_entered:
                self.model.cancel(key, self._timeline.now)
                self._settle()
            else:
                self._end_before(opened, "cancelled")
        held, target = self._held.get(key), self._targets.get(key)
        if held is not None and held.epoch == epoch:
            self.free(held)
        elif target is not None and target.lease.epoch == epoch:
            target.abort()

    def events(self, owner: str) -> SimulatedMailbox:
        if owner not in self._mailboxes:
            self._mailboxes[owner] = SimulatedMailbox(self._timeline)
        return self._mailboxes[owner]

    @property
    def load(self) -> EngineLoad:
        return self.model.load

    @property
    def health(self) -> EngineHealth:
        return EngineHealth(num_steps=self.model.num_steps)

    async def idle(self) -> None:
        """Return at once: no step outlives its sequences."""

    async def run(self) -> None:
        """Return at once: the heap of the simulation runs the model."""

    # ---- transfers ---------------------------------------------------------------------------

    def export(self, lease: LeaseRef) -> SimulatedSource:
        if self._held.get((lease.request_id, lease.choice)) != lease:
            raise StaleLease(f"the blocks of request {lease.request_id} are gone")
        return SimulatedSource(self, lease)

    async def import_(self, offer: LeaseOffer) -> SimulatedTarget:
        self._check_up()
        key = offer.request_id, offer.choice
        known = self._targets.get(key)
        if known is not None:
            return known
        flag = self._granting[key] = self._timeline.flag()
        self.model.reserve(key, self._timeline.now, num_tokens=offer.num_tokens)
        self._settle()
        try:
            await flag.wait()
        except BaseException:
            self.model.release(key, self._timeline.now)
            self._settle()
            raise
        finally:
            self._granting.pop(key, None)
        self._check_up()
        target = self._targets[key] = SimulatedTarget(
            self, self._lease(offer.request_id, offer.choice, offer.epoch, offer.num_tokens)
        )
        return target

    async def receive(self, sender: EngineReplica, lease: LeaseRef) -> None:
        """Wait until a link has moved the blocks of a lease to this replica."""
        num_blocks = self.facts.shape.num_blocks(lease.num_tokens)
        await self._links.transfer(sender, self.place, num_blocks * self.facts.kv_block_bytes)

    def has_target(self, lease: LeaseRef) -> bool:
        target = self._targets.get((lease.request_id, lease.choice))
        return target is not None and target.lease == lease

    def free(self, lease: LeaseRef) -> None:
        """Free the blocks of a prompt that were held for a transfer. May be called again."""
        key = lease.request_id, lease.choice
        if self._held.get(key) == lease:
            del self._held[key]
            self.model.release(key, self._timeline.now)
            self._settle()

    def abort(self, lease: LeaseRef) -> None:
        """Free reserved blocks, unless a sequence has adopted them."""
        if self.has_target(lease):
            key = lease.request_id, lease.choice
            del self._targets[key]
            self.model.release(key, self._timeline.now)
            self._settle()

    def _claim(self, key: ChoiceKey, lease: LeaseRef) -> LeaseRef | None:
        """Take a lease out of the register of its kind; the model gives its blocks to the next
        sequence of the key.
        """
        if self._held.get(key) == lease:
            return self._held.pop(key)
        if self.has_target(lease):
            return self._targets.pop(key).lease
        return None

    def _lease(self, request_id: str, choice: int, epoch: int, num_tokens: int) -> LeaseRef:
        return LeaseRef(
            engine=self.place.engine,
            replica=self.place.number,
            lease_id=0,
            request_id=request_id,
            choice=choice,
            epoch=epoch,
            num_tokens=num_tokens,
        )

    # ---- faults ------------------------------------------------------------------------------

    def lose(self, cause: LossCause = "death") -> None:
        """Lose all sequences and blocks, as an engine whose process ends, until `restart`."""
        self._host.flush()
        lost: dict[str, list[EngineEvent]] = {}
        for (request_id, choice), opened in self._open.items():
            state = opened.state
            event = Lost(request_id=request_id, choice=choice, epoch=state.epoch, cause=cause)
            lost.setdefault(state.owner, []).append(event)
        self.model = self.model.emptied(self._timeline.now)
        self._is_up = False
        self._open.clear()
        self._held.clear()
        self._targets.clear()
        self._due_s = float("inf")
        self._links.drop(self.place)
        for flag in self._granting.values():
            flag.set()
        for owner, events in lost.items():
            self.events(owner).post(events)

    def restart(self) -> None:
        """Take sequences again, with an empty pool."""
        self._is_up = True

    def _check_up(self) -> None:
        if not self._is_up:
            raise EngineLost(*self.place, cause="none")

    # ---- progress ----------------------------------------------------------------------------

    def _settle(self) -> None:
        """After a call of the model: wake granted reservations, and plan the next change."""
        granted = self.model.kept.granted
        while granted:
            key = granted.pop()
            assert isinstance(key, tuple)
            self._granting[key].set()
        at_s = self.model.next_at
        if at_s != self._due_s:
            self._due_s = at_s
            if at_s < float("inf"):
                self._timeline.at(at_s, lambda: self._advance(at_s), is_late=True)

    def _advance(self, due_s: float) -> None:
        if due_s != self._due_s:
            return
        self._due_s = float("inf")
        progress = self.model.advance(self._timeline.now)
        self._settle()
        self._reports.flush(self.model.blocks)
        self._deliver(progress)

    def _deliver(self, progress: list[SequenceProgress]) -> None:
        """Give the events of a step to the operators that wait for them."""
        batches: dict[str, list[EngineEvent]] = {}
        for one in progress:
            owner, event = self._event(one)
            batches.setdefault(owner, []).append(event)

        def post() -> None:
            for owner, events in batches.items():
                self.events(owner).post(events)

        if batches:
            self._host.deliver(self.model.num_rows, post)

    def _event(self, progress: SequenceProgress) -> tuple[str, EngineEvent]:
        """The event for the progress of a sequence, and the operator that gets it."""
        opened = self._open[progress.key]
        state = opened.state
        is_first = opened.num_emitted == state.num_emitted and progress.num_tokens > 0
        end = progress.end
        is_held = opened.is_held and end == "length"
        if is_first:
            opened.prefilled_s = progress.at_s
        stamps = Stamps(
            started_s=progress.begun_s,
            prefilled_s=opened.prefilled_s,
            finished_s=progress.at_s if end is not None and not is_held else None,
        )
        num_more = progress.num_tokens - is_first
        event = TokenEvent(
            request_id=state.request_id,
            choice=state.choice,
            epoch=state.epoch,
            position=opened.num_emitted,
            token_ids=_FIRST if is_first else (),
            num_tokens_without_ids=num_more,
            finish_reason=None if is_held else end,
            num_prompt_tokens=opened.num_prompt,
            num_cached_tokens=progress.num_cached,
            stamps=stamps,
        )
        opened.num_emitted += progress.num_tokens
        if end is not None:
            del self._open[progress.key]
        if not state.hold_kv or not is_first:
            return state.owner, event
        lease = None
        if is_held:
            num_known = opened.num_prompt + state.num_emitted
            lease = self._lease(state.request_id, state.choice, state.epoch, num_known)
            self._held[progress.key] = lease
        return state.owner, PrefillDone(first=event, lease=lease)

    def report_cache(self, on_change: OnCacheChanged) -> None:
        self._reports.begin(self.model.blocks, on_change)
