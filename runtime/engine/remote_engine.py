"""The engine port, spoken over a channel to a worker in another process."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from sagellm.runtime.comm.channel import Channel, ChannelClosed
from sagellm.runtime.comm.protocol import (
    BlocksReserved,
    CacheUpdate,
    Cancel,
    Done,
    Drop,
    Events,
    Exported,
    Grant,
    GrantCacheUpdate,
    Idle,
    Pong,
    Refused,
    Release,
    RenewLease,
    Submit,
    SyncCache,
)
from sagellm.runtime.engine.loop import STEP_TOKENS
from sagellm.runtime.engine.mailbox import Mailbox
from sagellm.runtime.engine.worker_calls import LEASE_S, Question
from sagellm.runtime.histograms import Buckets
from sagellm.runtime.kv.lease import Fence
from sagellm.runtime.messages import SequenceState, TokenEvent
from sagellm.runtime.port import (
    DamagedBlocks,
    EngineEvent,
    EngineFacts,
    EngineHealth,
    EngineLoad,
    EngineLost,
    EngineRefusal,
    LossCause,
    Lost,
    PrefillDone,
    StaleLease,
)
from sagellm.runtime.prefixes import CacheChanged, OnCacheChanged


@dataclass(slots=True)
class _Call:
    """A question under way: `answer`, or the loss of the worker, sets `done`."""

    done: trio.Event = field(default_factory=trio.Event)
    answer: Done | BlocksReserved | Exported | Refused | None = None  # None: lost
    cause: LossCause = "none"  # of the loss


class RemoteEngine:
    """One replica of any kind that a worker runs; the worker may be replaced, and is missing
    meanwhile.

    Nothing of one life reaches the next: what was open ends as `Lost`, what was asked as
    EngineLost, and a new life begins with no sequence and no lease.
    """

    def __init__(
        self,
        facts: EngineFacts,
        *,
        name: str,
        replica: int = 0,
        on_change: Callable[[bool], None] = lambda is_up: None,
    ) -> None:
        self.facts = facts
        self.name = name
        self.replica = replica
        self._on_change = on_change
        self.num_lives = 0
        self.is_removed = False  # nobody is to take the place of its last worker
        self.has_served = False  # this life, or the last one, has given a token
        self.unserved: frozenset[tuple[str, int]] = frozenset()  # without a token as it ended
        self._channel: Channel | None = None
        self._numbers: Iterator[int] = itertools.count()
        self._calls: dict[int, _Call] = {}
        self._mailboxes: dict[str, Mailbox] = {}
        self._open: dict[Fence, str] = {}  # sequences under way, and their owners
        self._waiting: set[Fence] = set()  # of those: nothing has come of them yet
        self._submitting: set[Fence] = set()  # asked for, and not answered yet
        self._gone: dict[Fence, LossCause] = {}  # of those: lost meanwhile, and why
        self._num_ungranted: dict[str, int] = {}  # batches of this life that a reader has to take
        self._tell_cache: OnCacheChanged = lambda changed: None
        self._load = EngineLoad(num_blocks=facts.num_blocks, num_free_blocks=facts.num_blocks)
        self._health = EngineHealth()
        self._earlier_steps = Buckets(STEP_TOKENS)  # of earlier lives
        self._steps = Buckets(STEP_TOKENS)

    # ---- the port ------------------------------------------------------------------------------

    async def submit(self, state: SequenceState) -> None:
        fence = Fence(state.request_id, state.choice, state.epoch)
        self._require()
        if fence in self._open:
            raise EngineRefusal(f"choice {state.choice} of {state.request_id} runs here already")
        self._open[fence] = state.owner  # its first events may come with the answer
        self._waiting.add(fence)
        self._submitting.add(fence)
        try:
            with trio.CancelScope(shield=True):  # brief; a cancel is heard behind it
                await self.ask(lambda call: Submit(call=call, state=state))
        except (EngineRefusal, StaleLease, EngineLost):
            self._open.pop(fence, None)
            self._waiting.discard(fence)
            raise
        else:
            if fence in self._gone:  # behind its answer: its first events may be here already
                self._post_lost(fence, state.owner, self._gone[fence])
        finally:
            self._submitting.discard(fence)
            self._gone.pop(fence, None)

    def cancel(self, request_id: str, choice: int, epoch: int) -> None:
        self.say(Cancel(request_id=request_id, choice=choice, epoch=epoch))

    def events(self, owner: str) -> "_Reader":
        return _Reader(self, owner, self._mailbox(owner))

    @property
    def load(self) -> EngineLoad:
        return self._load

    @property
    def health(self) -> EngineHealth:
        return self._health

    @property
    def step_tokens(self) -> Buckets:
        """Tokens that a step computed, of all lives."""
        steps = self._earlier_steps.copy()
        steps.add(self._steps)
        return steps

    def report_cache(self, tell: OnCacheChanged) -> None:
        """To be asked again in each life."""
        self._tell_cache = tell
        self.say(SyncCache())

    async def idle(self) -> None:
        try:
            await self.ask(lambda call: Idle(call=call))
        except EngineLost:
            await trio.lowlevel.checkpoint()

    async def run(self) -> None:
        """The supervisor runs the worker; here is nothing to step."""
        await trio.sleep_forever()

    # ---- lives ---------------------------------------------------------------------------------

    @property
    def is_lost(self) -> bool:
        return self._channel is None

    async def live(self, channel: Channel) -> str:
        """One life: until this is cancelled, or the channel ends; why it did."""
        self._channel = channel
        self.num_lives += 1
        self.has_served = False
        self._on_change(True)
        cause: LossCause = "death"  # unless the link says that it has ended
        try:
            while True:
                self._hear(await channel.receive())
        except ChannelClosed as error:
            cause = "link"
            return str(error)
        finally:
            self._lose(cause)

    def _lose(self, cause: LossCause) -> None:
        """The worker is gone, with all that it held."""
        self._channel = None
        self._on_change(False)  # first, so that what re-enters goes elsewhere
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.cause = cause
            call.done.set()
        self.unserved = frozenset((one.request_id, one.choice) for one in self._waiting)
        self._lose_sequences(cause)
        self._num_ungranted.clear()
        num_blocks = self.facts.num_blocks
        self._load = EngineLoad(num_blocks=num_blocks, num_free_blocks=num_blocks)
        self._health = EngineHealth()
        self._earlier_steps, self._steps = self.step_tokens, Buckets(STEP_TOKENS)

    def _lose_sequences(self, cause: LossCause) -> None:
        """Behind all events that have come: none comes after it."""
        lost, self._open = self._open, {}
        self._waiting.clear()
        for fence, owner in lost.items():
            if fence in self._submitting:
                self._gone[fence] = cause
            else:
                self._post_lost(fence, owner, cause)

    def _post_lost(self, fence: Fence, owner: str, cause: LossCause) -> None:
        mailbox = self._mailbox(owner)
        mailbox.post(
            Lost(
                request_id=fence.request_id,
                choice=fence.choice,
                epoch=fence.epoch,
                cause=cause,
            )
        )
        mailbox.flush()

    def evict(self) -> None:
        """Let go of every sequence, as if the worker were lost, while it goes on: the caller has
        seen to it that nothing new comes.
        """
        for fence in self._open:
            self.cancel(fence.request_id, fence.choice, fence.epoch)
        self._lose_sequences("none")

    def _hear(self, message: object) -> None:
        match message:
            case Events(owner=owner, events=events, load=load):
                self._load = load
                self._take(owner, events)
            case CacheUpdate():
                self._tell_cache(self._changed(message))
                self.say(GrantCacheUpdate())
            case (
                Done(call=call)
                | BlocksReserved(call=call)
                | Exported(call=call)
                | Refused(call=call)
            ):
                waiting = self._calls.pop(call, None)
                if waiting is not None:
                    waiting.answer = message
                    waiting.done.set()
            case Pong(load=load, health=health, step_tokens=counts, num_step_tokens=total):
                self._load, self._health = load, health
                if len(counts) == len(self._steps.counts):
                    self._steps.counts, self._steps.total = list(counts), total

    def _changed(self, news: CacheUpdate) -> CacheChanged:
        return CacheChanged(
            engine=self.name,
            replica=self.replica,
            epoch=self.num_lives,
            sequence=news.sequence,
            is_first=news.is_first,
            stored=news.stored,
            dropped=news.dropped,
        )

    def _take(self, owner: str, events: tuple[TokenEvent | PrefillDone, ...]) -> None:
        mailbox, is_empty = self._mailbox(owner), True
        for event in events:
            token = event.first if isinstance(event, PrefillDone) else event
            fence = Fence(token.request_id, token.choice, token.epoch)
            if fence not in self._open:
                continue  # it was evicted
            mailbox.post(event)
            self._waiting.discard(fence)
            is_empty, self.has_served = False, True
            if token is not event or token.is_last:
                del self._open[fence]
        mailbox.flush()
        self._num_ungranted[owner] = self._num_ungranted.get(owner, 0) + 1
        if is_empty:  # no reader will take it
            self.grant(owner)

    def grant(self, owner: str) -> None:
        """A batch was taken: one more may be sent. Of an earlier life, none is owed."""
        if self._num_ungranted.get(owner):
            self._num_ungranted[owner] -= 1
            self.say(Grant(owner=owner))

    def _mailbox(self, owner: str) -> Mailbox:
        if owner not in self._mailboxes:
            self._mailboxes[owner] = Mailbox(lambda: None)
        return self._mailboxes[owner]

    # ---- asking --------------------------------------------------------------------------------

    def _require(self) -> Channel:
        if self._channel is None:
            raise EngineLost(self.name, self.replica)
        return self._channel

    def say(
        self, message: Cancel | Release | RenewLease | Grant | SyncCache | GrantCacheUpdate | Drop
    ) -> None:
        """Tell the worker, if there is one; one that is gone has nothing left to do it to."""
        if self._channel is not None:
            with suppress(ChannelClosed):  # whoever receives from it learns so, too
                self._channel.put(message)

    async def ask(
        self, question: Question, meanwhile: Callable[[], None] | None = None
    ) -> Done | BlocksReserved | Exported:
        """The answer. Raises EngineLost, and what the worker raised. `meanwhile` is called again
        and again, more than once in LEASE_S.

        Cancelled, the worker is told, and its answer awaited all the same: until then it may still
        read or write the blocks that the caller is about to free.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        channel, number = self._require(), next(self._numbers)
        call = self._calls[number] = _Call()
        try:
            channel.put(question(number))
        except ChannelClosed:
            del self._calls[number]
            raise EngineLost(self.name, self.replica) from None
        try:
            while meanwhile is not None and not call.done.is_set():
                with trio.move_on_after(LEASE_S / 3):
                    await call.done.wait()
                    break
                meanwhile()
            await call.done.wait()
        except trio.Cancelled:
            self.say(Drop(call=number))
            with trio.CancelScope(shield=True):
                await call.done.wait()
            raise
        if call.answer is None:
            raise EngineLost(self.name, self.replica, cause=call.cause)
        if isinstance(call.answer, Refused):
            raise _raised(call.answer)
        return call.answer


def _raised(refused: Refused) -> Exception:
    """What the call raised, over there."""
    if refused.kind == "stale":
        return StaleLease(refused.error)
    if refused.kind == "damaged":
        return DamagedBlocks(refused.error)
    return EngineRefusal(refused.error, refused.code)


@dataclass(frozen=True, slots=True)
class _Reader:
    """The events of one owner; each batch that was taken makes room for one more."""

    engine: RemoteEngine
    owner: str
    mailbox: Mailbox

    def __aiter__(self) -> "_Reader":
        return self

    async def __anext__(self) -> tuple[EngineEvent, ...]:
        batch = await self.mailbox.__anext__()
        if not isinstance(batch[0], Lost):
            self.engine.grant(self.owner)
        return batch
