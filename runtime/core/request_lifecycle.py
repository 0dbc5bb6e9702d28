"""The life cycle of requests: opens them, keeps their signals, and ends each choice once."""

import heapq
import math

import msgspec

from sagellm.runtime.core.accounting import Ledger
from sagellm.runtime.core.credit import Gates
from sagellm.runtime.core.effects import Deliver, Faulted, Interrupt, OperatorFault, Reaction
from sagellm.runtime.core.journal import HeldItems
from sagellm.runtime.core.recovery import Recovery
from sagellm.runtime.messages import (
    Answer,
    ChoiceKey,
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


class OpenChoices(msgspec.Struct):
    """One open request, with those of its choices that have not ended."""

    choices: set[int]
    expires_s: float | None = None
    tombstone: Signal | None = None  # the first signal that ended the whole request
    arrived_s: float = 0.0
    unavailable: set[int] = set()  # choices that waited too long for an engine


class Register:
    """The open requests. A request is opened when it enters, and closed choice by choice.

    `abandoned`: choices that have ended, but that their engine has not released yet.
    """

    def __init__(self) -> None:
        self.entries: dict[str, OpenChoices] = {}
        self.abandoned: set[ChoiceKey] = set()
        self.expiries_changed = False  # whether `next_expiry_s` may differ from its last value
        self._expiries: list[tuple[float, str]] = []  # a heap; may hold requests that have ended

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

    def is_open(self, key: ChoiceKey) -> bool:
        entry = self.entries.get(key[0])
        return entry is not None and key[1] in entry.choices

    def is_over(self, key: ChoiceKey) -> bool:
        """Whether a choice has ended, or is about to end because no engine is available."""
        entry = self.entries.get(key[0])
        return entry is None or key[1] not in entry.choices or key[1] in entry.unavailable

    def close(self, key: ChoiceKey) -> bool:
        """Close a choice. Returns whether it was the last open choice of its request."""
        entry = self.entries[key[0]]
        entry.choices.discard(key[1])
        if entry.choices:
            return False
        del self.entries[key[0]]
        if entry.expires_s is not None:
            self.expiries_changed = True
        return True

    def tombstone(self, request_id: str) -> Signal | None:
        """The signal that ended a request that is still open; None without one."""
        entry = self.entries.get(request_id)
        return entry.tombstone if entry else None

    def record_signal(self, signal: Signal) -> None:
        """Keep a signal until its request is closed, for items that it overtook."""
        entry = self.entries[signal.request_id]
        if signal.choice is None and entry.tombstone is None:
            entry.tombstone = signal

    @property
    def next_expiry_s(self) -> float:
        """The time at which the first open request expires; infinite if none does."""
        self.expiries_changed = False
        while self._expiries and not self._is_due(*self._expiries[0]):
            heapq.heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else math.inf

    def take_expired(self, now: float) -> list[str]:
        """Take and return the requests that have expired since the last call."""
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
    """Opens requests, delivers their items to the session, and ends each choice exactly once.

    `drops_tokens`: whether an operator may leave out tokens of an answer.
    """

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
        self.to_forget: list[str] = []  # ended requests that operators still know
        self._releasing: set[str] = set()  # ended requests that service operators still hold
        self._reaction = reaction
        self._gates = gates
        self._held_items = held_items

    def open(self, requests: tuple[Request, ...]) -> None:
        """Open a request with all its choices."""
        first, numbers = requests[0], {request.choice for request in requests}
        if first.request_id in self._releasing:
            self._releasing.remove(first.request_id)
            self.to_forget.append(first.request_id)
        self.register.open(first.request_id, numbers, first.expires_s, now=self._reaction.now)
        for request in requests:
            self.ledger.accept(request.key, position=request.num_emitted)

    def deliver(
        self, item: Item | Forked, *, terminal: bool = False, error: Exception | None = None
    ) -> None:
        """Deliver an item to the session, and close its choice if the item is the last.

        Items of a closed choice are dropped: a choice may end while its engine still computes.
        `terminal`: whether an operator or the core, not an engine, ended the choice.
        """
        if type(item) is TokenEvent and item.finish_reason is None:
            self._deliver_tokens(item, error)
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

    def _deliver_tokens(self, event: TokenEvent, error: Exception | None) -> None:
        """Deliver tokens that do not end their choice; a fast path, as most items are such."""
        entry = self.register.entries.get(event.request_id)
        if entry is not None and event.choice in entry.choices:
            self.ledger.record_tokens(event)
            self._reaction.effects.append(Deliver(event, error))
            if self.recovery.is_under_way:
                self.recovery.note(event)

    def finish(self, item: Item, reason: FinishReason | None = None) -> None:
        """End the choice of an item, unless it has ended. Without `reason`, its signal decides."""
        reason = reason or reason_of(self.register.tombstone(item.request_id))
        self.deliver(end_event(item, reason, now=self._reaction.now), terminal=True)

    def fail(self, fault: OperatorFault, item: Item, *, is_logged: bool = False) -> None:
        """End the choice of an item on which an operator failed. Logs an unlogged fault."""
        if not is_logged:
            self._reaction.effects.append(Faulted(fault, item.request_id))
        event = failure_event(item, fault.public, now=self._reaction.now)
        self.deliver(event, terminal=True, error=fault.error)

    def end(self, event: TokenEvent, fault: OperatorFault | None) -> None:
        """End a choice with `event`, unless it has ended, and log the fault that ended it."""
        if fault is not None and self.register.is_open(event.key):
            self._reaction.effects.append(Faulted(fault, event.request_id))
        self.deliver(event, terminal=True, error=fault.error if fault is not None else None)

    def fail_open(self) -> None:
        """End all open choices as failed, because the graph stops."""
        for request_id, entry in tuple(self.register.entries.items()):
            for choice in sorted(entry.choices):
                last = TokenEvent(
                    request_id=request_id, choice=choice, finish_reason="failed", error=_STOPPED
                )
                self.ledger.record(last)
                self._reaction.effects.append(Deliver(last))
        self.register.entries.clear()

    def take_to_forget(self) -> list[str]:
        """Take and return the ended requests that operators must forget."""
        taken, self.to_forget = self.to_forget, []
        return taken

    def interrupt(self, signal: Signal) -> None:
        """Give a signal to the replicas that hold a choice of its request."""
        holders = self._gates.holders(signal.request_id, signal.choice)
        for node, replica in dict.fromkeys(gate for gate, _ in holders):
            self._reaction.effects.append(Interrupt(node, replica, signal))

    def is_held(self, request_id: str, choice: int) -> bool:
        """Whether a service operator holds a choice."""
        return bool(self._gates.holders(request_id, choice))

    def note_released(self, key: ChoiceKey) -> None:
        """Record that a service operator has released an item of a choice."""
        if key in self.register.abandoned and not self.is_held(*key):
            self.register.abandoned.discard(key)
        if key[0] in self._releasing and not self._gates.holds(key[0]):
            self._releasing.remove(key[0])
            self.to_forget.append(key[0])

    def _fork(self, forked: Forked) -> None:
        entry = self.register.entries.get(forked.request_id)
        if entry is not None:
            entry.choices |= set(range(forked.num_choices))
            self.ledger.fork(forked)
            self._reaction.effects.append(Deliver(forked))

    def _with_reason(self, item: Item) -> Item:
        """The item with the real reason: operators report every end by a signal as `cancelled`."""
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
            # The engine still computes the choice (for example, a user's function failed on it).
            self.register.abandoned.add(key)
            self.interrupt(Signal("cancel", *key))
        # Operators that count credit must know the request until all its credit is returned.
        if is_last and self._gates.holds(key[0]):
            self._releasing.add(key[0])
        elif is_last:
            self.to_forget.append(key[0])


def ends(item: Item | Forked) -> bool:
    """Whether an item is the last of its choice."""
    if isinstance(item, TokenEvent):  # first, as nearly all items are token events
        return item.is_last
    return not isinstance(item, Forked | Request | Prefilled)


def reason_of(signal: Signal | None) -> FinishReason:
    return "expired" if signal and signal.kind == "expire" else "cancelled"


def unavailable_event(request: Request, now: float) -> TokenEvent:
    """The last event of a request that no engine can serve."""
    return refusal(request, "refused", now=now, error=_NO_ENGINE, code="unavailable")


def quarantined_event(request: Request, now: float) -> TokenEvent:
    """The last event of a request that may have crashed engines."""
    return refusal(request, "failed", now=now, error=_QUARANTINED, code="request_quarantined")


def retries_spent_event(request: Request, now: float) -> TokenEvent:
    """The last event of a request that was lost too often, though probably not by its own fault."""
    return refusal(request, "failed", now=now, error=_SPENT, code="engine_failed")
