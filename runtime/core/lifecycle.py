"""The life cycle of requests: which are open, their signals, and how each choice ends."""

import heapq
import math

import msgspec

from sagellm.runtime.core.accounting import Ledger
from sagellm.runtime.core.credit import ChoiceKey, Gates
from sagellm.runtime.core.effects import Deliver, Faulted, Interrupt, OperatorFault, Reaction
from sagellm.runtime.core.journal import HeldItems
from sagellm.runtime.core.recovery import Recovery
from sagellm.runtime.messages import (
    Answer,
    FinishReason,
    Forked,
    Item,
    Prefilled,
    Request,
    TokenEvent,
    refusal,
)
from sagellm.runtime.operator import Signal
from sagellm.runtime.user_function import end_event, failure_event

RegisterKey = tuple[str, int]


class OpenChoices(msgspec.Struct):
    """One open request: its choices that have had no last event yet."""

    choices: set[int]
    expires_s: float | None = None
    tombstone: Signal | None = None
    arrived_s: float = 0.0
    unavailable: set[int] = set()  # choices that waited too long for an engine


class Register:
    """Opened when a request enters, closed choice by choice.

    `abandoned` holds choices that ended outside their engine, until the engine lets go of them.
    """

    def __init__(self) -> None:
        self.entries: dict[str, OpenChoices] = {}
        self.abandoned: set[RegisterKey] = set()
        self.expiries_changed = False  # since `next_expiry_s` was read last
        self._expiries: list[tuple[float, str]] = []

    def __contains__(self, request_id: str) -> bool:
        if request_id in self.entries:
            return True
        return any(key[0] == request_id for key in self.abandoned)

    @property
    def is_empty(self) -> bool:
        return not self.entries and not self.abandoned

    def open(
        self, request_id: str, choices: set[int], expires_s: float | None, *, now: float
    ) -> None:
        self.entries[request_id] = OpenChoices(choices, expires_s, arrived_s=now)
        if expires_s is not None:
            self.expiries_changed = True
            heapq.heappush(self._expiries, (expires_s, request_id))

    def is_open(self, key: RegisterKey) -> bool:
        entry = self.entries.get(key[0])
        return entry is not None and key[1] in entry.choices

    def is_over(self, key: RegisterKey) -> bool:
        """Whether a choice has ended, or is to end wherever it waits."""
        entry = self.entries.get(key[0])
        return entry is None or key[1] not in entry.choices or key[1] in entry.unavailable

    def close(self, key: RegisterKey) -> bool:
        """Strike a choice out; True where it was the request's last."""
        entry = self.entries[key[0]]
        entry.choices.discard(key[1])
        if entry.choices:
            return False
        del self.entries[key[0]]
        if entry.expires_s is not None:
            self.expiries_changed = True
        return True

    def tombstone(self, request_id: str) -> Signal | None:
        entry = self.entries.get(request_id)
        return entry.tombstone if entry else None

    def record_signal(self, signal: Signal) -> None:
        """Keep a signal until the request has ended, for operators that it has overtaken."""
        entry = self.entries[signal.request_id]
        if signal.choice is None and entry.tombstone is None:
            entry.tombstone = signal

    @property
    def next_expiry_s(self) -> float:
        """When the first open request expires; what has ended before its time is forgotten."""
        self.expiries_changed = False
        while self._expiries and not self._is_due(*self._expiries[0]):
            heapq.heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else math.inf

    def take_expired(self, now: float) -> list[str]:
        """The requests whose time has come, each once."""
        due = []
        while self.next_expiry_s <= now:
            due.append(heapq.heappop(self._expiries)[1])
        return due

    def _is_due(self, at: float, request_id: str) -> bool:
        entry = self.entries.get(request_id)
        return entry is not None and entry.expires_s == at


_NO_ENGINE = "no engine is there to serve it: try again later"
_QUARANTINED = "engines died of this request, or of its like: it is not tried again"
_SPENT = "engines, or the links between them, failed too often: try again later"
_STOPPED = "the graph stopped before this request ended"


class RequestLifecycle:
    """`drops_tokens`: an operator of the graph may leave tokens of an answer out."""

    def __init__(
        self,
        reaction: Reaction,
        gates: Gates,
        held_items: HeldItems,
        register: Register,
        *,
        drops_tokens: bool,
    ) -> None:
        self.ledger = Ledger(gaps=drops_tokens)
        self.register = register
        self.recovery = Recovery(reaction.time)
        self.forgotten: list[str] = []  # requests that ended, and that operators still know
        self._releasing: set[str] = set()  # those that service operators still hold something of
        self._reaction = reaction
        self._gates = gates
        self._held_items = held_items

    def open(self, requests: tuple[Request, ...]) -> None:
        """All choices of one request enter."""
        first, numbers = requests[0], {request.choice for request in requests}
        if first.request_id in self._releasing:
            self._releasing.remove(first.request_id)
            self.forgotten.append(first.request_id)
        self.register.open(first.request_id, numbers, first.expires_s, now=self._reaction.now)
        for request in requests:
            self.ledger.accept(request.key, position=request.num_emitted)

    def to_sink(
        self, item: Item | Forked, *, terminal: bool = False, error: Exception | None = None
    ) -> None:
        """Deliver an item, and close the books of a choice with its last one.

        Items after the last one are dropped: a choice may end outside its engine.
        """
        if type(item) is TokenEvent and item.finish_reason is None:
            self._pass_tokens(item, error)
        elif isinstance(item, Forked):
            self._fork(item)
        elif self.register.is_open(item.key):
            item = self._with_reason(item)
            self.ledger.record(item)
            self._reaction.effects.append(Deliver(item, error))
            if self.recovery.is_under_way:
                self.recovery.note(item)
            if ends(item):
                self._close(item, terminal=terminal)

    def _pass_tokens(self, event: TokenEvent, error: Exception | None) -> None:
        """Deliver tokens that are not the last of their choice: nearly all that is delivered."""
        entry = self.register.entries.get(event.request_id)
        if entry is not None and event.choice in entry.choices:
            self.ledger.record_tokens(event)
            self._reaction.effects.append(Deliver(event, error))
            if self.recovery.is_under_way:
                self.recovery.note(event)

    def finish(self, item: Item, reason: FinishReason | None = None) -> None:
        """Give a choice its last event, unless it has had it. None: as it was signalled."""
        reason = reason or reason_of(self.register.tombstone(item.request_id))
        self.to_sink(end_event(item, reason, now=self._reaction.now), terminal=True)

    def fail(self, fault: OperatorFault, item: Item, *, is_logged: bool = False) -> None:
        """End a choice as failed by an operator, and log why, if that is not logged yet."""
        if not is_logged:
            self._reaction.effects.append(Faulted(fault, item.request_id))
        event = failure_event(item, fault.public, now=self._reaction.now)
        self.to_sink(event, terminal=True, error=fault.error)

    def end(self, event: TokenEvent, fault: OperatorFault | None) -> None:
        """Give a choice its last event; log the fault that ended it, unless it had ended before."""
        if fault is not None and self.register.is_open(event.key):
            self._reaction.effects.append(Faulted(fault, event.request_id))
        self.to_sink(event, terminal=True, error=fault.error if fault is not None else None)

    def fail_open(self) -> None:
        """The graph stops: end all that is open."""
        for request_id, entry in tuple(self.register.entries.items()):
            for choice in sorted(entry.choices):
                last = TokenEvent(
                    request_id=request_id, choice=choice, finish_reason="failed", error=_STOPPED
                )
                self.ledger.record(last)
                self._reaction.effects.append(Deliver(last))
        self.register.entries.clear()

    def take_forgotten(self) -> list[str]:
        """Requests that have ended, each once: operators are to forget them."""
        taken, self.forgotten = self.forgotten, []
        return taken

    def interrupt(self, signal: Signal) -> None:
        """Give a signal to the replicas that hold something of its request."""
        holders = self._gates.holders(signal.request_id, signal.choice)
        for node, replica in dict.fromkeys(gate for gate, _ in holders):
            self._reaction.effects.append(Interrupt(node, replica, signal))

    def is_held(self, request_id: str, choice: int) -> bool:
        """Whether a service operator holds something of a choice."""
        return bool(self._gates.holders(request_id, choice))

    def note_released(self, key: ChoiceKey) -> None:
        """A service operator holds an item of a choice no more."""
        if key in self.register.abandoned and not self.is_held(*key):
            self.register.abandoned.discard(key)
        if key[0] in self._releasing and not self._gates.holds(key[0]):
            self._releasing.remove(key[0])
            self.forgotten.append(key[0])

    def _fork(self, forked: Forked) -> None:
        entry = self.register.entries.get(forked.request_id)
        if entry is not None:
            entry.choices |= set(range(forked.num_choices))
            self.ledger.fork(forked)
            self._reaction.effects.append(Deliver(forked))

    def _with_reason(self, item: Item) -> Item:
        """Operators report every end from outside as `cancelled`; supply the real reason."""
        if getattr(item, "finish_reason", None) != "cancelled":
            return item
        assert isinstance(item, TokenEvent | Answer)
        entry = self.register.entries[item.request_id]
        if item.choice in entry.unavailable:
            return msgspec.structs.replace(
                item, finish_reason="refused", error=_NO_ENGINE, code="unavailable"
            )
        if entry.tombstone and entry.tombstone.kind == "expire":
            return msgspec.structs.replace(item, finish_reason="expired")
        return item

    def _close(self, item: Item, *, terminal: bool) -> None:
        key: ChoiceKey = item.key
        is_last = self.register.close(key)
        self._held_items.forget(key[0], None if is_last else key[1])
        self.recovery.forget(key)
        if terminal and self.is_held(*key):
            # It ended outside its engine (a user's function failed): stop the engine too.
            self.register.abandoned.add(key)
            self.interrupt(Signal("cancel", *key))
        if is_last and self._gates.holds(key[0]):
            self._releasing.add(key[0])
        elif is_last:
            self.forgotten.append(key[0])


def ends(item: Item | Forked) -> bool:
    """Whether this is the last item of its choice."""
    if isinstance(item, TokenEvent):  # nearly all are
        return item.is_last
    return not isinstance(item, Forked | Request | Prefilled)


def reason_of(signal: Signal | None) -> FinishReason:
    return "expired" if signal and signal.kind == "expire" else "cancelled"


def unavailable_event(request: Request, now: float) -> TokenEvent:
    """The end of a request that no engine can serve."""
    return refusal(request, "refused", now=now, error=_NO_ENGINE, code="unavailable")


def quarantined_event(request: Request, now: float) -> TokenEvent:
    """The end of a request that engines may have died of."""
    return refusal(request, "failed", now=now, error=_QUARANTINED, code="request_quarantined")


def retries_spent_event(request: Request, now: float) -> TokenEvent:
    """The end of a request that came back too often, through no fault of its own that is known."""
    return refusal(request, "failed", now=now, error=_SPENT, code="engine_failed")
