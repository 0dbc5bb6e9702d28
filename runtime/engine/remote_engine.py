"""The engine port of a replica that a worker process runs: calls and events over a channel."""

from collections.abc import Callable
from dataclasses import dataclass

import trio

from sagellm.runtime.comm.channel import Channel, ChannelClosed
from sagellm.runtime.comm.protocol import (
    BlocksReserved,
    CacheUpdate,
    Cancel,
    Done,
    Events,
    Exported,
    Grant,
    GrantCacheUpdate,
    Idle,
    Pong,
    Refused,
    Submit,
    SyncCache,
)
from sagellm.runtime.containers import Buckets
from sagellm.runtime.engine.loop import STEP_TOKENS
from sagellm.runtime.engine.output import Mailbox
from sagellm.runtime.engine.worker_calls import WorkerCalls
from sagellm.runtime.kv.lease import Fence
from sagellm.runtime.messages import SequenceState, TokenEvent
from sagellm.runtime.port import (
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


class RemoteEngine:
    """Implements the engine port for one replica, of any kind, that a worker runs. A lost worker
    may be replaced; until then calls raise EngineLost.

    A life is the time of one worker. At its end, open sequences end with `Lost`, and open calls
    with EngineLost. The next life begins without sequences and leases.
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
        self.calls = WorkerCalls(name, replica)
        self.num_lives = 0
        self.is_removed = False  # the last worker will not be replaced
        self.has_served = False  # whether this life, or the last life, has given a token
        # Sequences (request id, choice) without a token when the last life ended.
        self.unserved: frozenset[tuple[str, int]] = frozenset()
        self._on_change = on_change
        self._mailboxes: dict[str, Mailbox] = {}
        self._open: dict[Fence, str] = {}  # open sequences, and their owners
        self._silent: set[Fence] = set()  # open sequences without an event
        self._submitting: set[Fence] = set()  # open sequences whose `submit` has not returned
        self._lost: dict[Fence, LossCause] = {}  # sequences lost while in `_submitting`
        self._num_ungranted: dict[str, int] = {}  # by owner: unread batches of this life
        self._tell_cache: OnCacheChanged = lambda changed: None
        self._load = EngineLoad(num_blocks=facts.num_blocks, num_free_blocks=facts.num_blocks)
        self._health = EngineHealth()
        self._earlier_steps = Buckets(STEP_TOKENS)  # of earlier lives
        self._steps = Buckets(STEP_TOKENS)

    # ---- the port ------------------------------------------------------------------------------

    async def submit(self, state: SequenceState) -> None:
        fence = Fence(state.request_id, state.choice, state.epoch)
        self.calls.require()
        if fence in self._open:
            raise EngineRefusal(f"choice {state.choice} of {state.request_id} runs here already")
        self._open[fence] = state.owner  # its first events may come with the answer
        self._silent.add(fence)
        self._submitting.add(fence)
        try:
            with trio.CancelScope(shield=True):  # brief; a cancellation is delivered after it
                await self.calls.ask(lambda call: Submit(call=call, state=state))
        except (EngineRefusal, StaleLease, EngineLost):
            self._open.pop(fence, None)
            self._silent.discard(fence)
            raise
        else:
            if fence in self._lost:  # after the answer: its first events may be here already
                self._post_lost(fence, state.owner, self._lost[fence])
        finally:
            self._submitting.discard(fence)
            self._lost.pop(fence, None)

    def cancel(self, request_id: str, choice: int, epoch: int) -> None:
        self.calls.say(Cancel(request_id=request_id, choice=choice, epoch=epoch))

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
        """A histogram of the tokens of each step, over all lives."""
        steps = self._earlier_steps.copy()
        steps.add(self._steps)
        return steps

    def report_cache(self, tell: OnCacheChanged) -> None:
        """Call `tell` with reports of cached blocks. Must be called again in each life."""
        self._tell_cache = tell
        self.calls.say(SyncCache())

    async def idle(self) -> None:
        try:
            await self.calls.ask(lambda call: Idle(call=call))
        except EngineLost:
            await trio.lowlevel.checkpoint()

    async def run(self) -> None:
        """Sleep until cancelled: the supervisor runs the worker, and the worker steps."""
        await trio.sleep_forever()

    # ---- lives ---------------------------------------------------------------------------------

    @property
    def is_lost(self) -> bool:
        return self.calls.channel is None

    @property
    def is_idle(self) -> bool:
        """Whether no sequence is open."""
        return not self._open

    async def live(self, channel: Channel) -> str:
        """Receive messages of a new worker until cancelled, or until the channel ends. Return why
        the channel ended.
        """
        self.calls.channel = channel
        self.num_lives += 1
        self.has_served = False
        self._on_change(True)
        cause: LossCause = "death"  # unless the channel reports the end of the link
        try:
            while True:
                self._take(await channel.receive())
        except ChannelClosed as error:
            cause = "link"
            return str(error)
        finally:
            self._lose(cause)

    def _lose(self, cause: LossCause) -> None:
        """End a life: end its calls and sequences, and reset its load and health."""
        self.calls.channel = None
        self._on_change(False)  # first, so that requests that re-enter go to other replicas
        self.calls.lose(cause)
        self.unserved = frozenset((fence.request_id, fence.choice) for fence in self._silent)
        self._lose_sequences(cause)
        self._num_ungranted.clear()
        num_blocks = self.facts.num_blocks
        self._load = EngineLoad(num_blocks=num_blocks, num_free_blocks=num_blocks)
        self._health = EngineHealth()
        self._earlier_steps, self._steps = self.step_tokens, Buckets(STEP_TOKENS)

    def _lose_sequences(self, cause: LossCause) -> None:
        """Post `Lost` for every open sequence, after all of its events."""
        lost, self._open = self._open, {}
        self._silent.clear()
        for fence, owner in lost.items():
            if fence in self._submitting:
                self._lost[fence] = cause
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
        """End every sequence as if the worker were lost, although the worker goes on. The caller
        must not submit new sequences.
        """
        for fence in self._open:
            self.cancel(fence.request_id, fence.choice, fence.epoch)
        self._lose_sequences("none")

    # ---- messages of the worker ----------------------------------------------------------------

    def _take(self, message: object) -> None:
        match message:
            case Events(owner=owner, events=events, load=load):
                self._load = load
                self._take_events(owner, events)
            case CacheUpdate():
                self._tell_cache(self._changed(message))
                self.calls.say(GrantCacheUpdate())
            case Done() | BlocksReserved() | Exported() | Refused():
                self.calls.take_answer(message)
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

    def _take_events(self, owner: str, events: tuple[TokenEvent | PrefillDone, ...]) -> None:
        mailbox, is_empty = self._mailbox(owner), True
        for event in events:
            token = event.first if isinstance(event, PrefillDone) else event
            fence = Fence(token.request_id, token.choice, token.epoch)
            if fence not in self._open:
                continue  # the sequence was evicted
            mailbox.post(event)
            self._silent.discard(fence)
            is_empty, self.has_served = False, True
            if token is not event or token.is_last:
                del self._open[fence]
        mailbox.flush()
        self._num_ungranted[owner] = self._num_ungranted.get(owner, 0) + 1
        if is_empty:  # no reader will take the batch
            self.grant(owner)

    def grant(self, owner: str) -> None:
        """Let the worker send one more batch, after a reader took one. A batch of an earlier life
        does not count.
        """
        if self._num_ungranted.get(owner):
            self._num_ungranted[owner] -= 1
            self.calls.say(Grant(owner=owner))

    def _mailbox(self, owner: str) -> Mailbox:
        if owner not in self._mailboxes:
            self._mailboxes[owner] = Mailbox(lambda: None)
        return self._mailboxes[owner]


@dataclass(frozen=True, slots=True)
class _Reader:
    """Iterates over the events of one owner. Each batch that is read lets the worker send
    one more.
    """

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
