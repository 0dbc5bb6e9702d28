"""The register: which requests are open, and what has been signalled to them."""

import heapq
import math

import msgspec

from sagellm.runtime.operator import Signal

Key = tuple[str, int]


class Entry(msgspec.Struct):
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
        self.entries: dict[str, Entry] = {}
        self.abandoned: set[Key] = set()
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
        self.entries[request_id] = Entry(choices, expires_s, arrived_s=now)
        if expires_s is not None:
            self.expiries_changed = True
            heapq.heappush(self._expiries, (expires_s, request_id))

    def is_open(self, key: Key) -> bool:
        entry = self.entries.get(key[0])
        return entry is not None and key[1] in entry.choices

    def is_over(self, key: Key) -> bool:
        """Whether a choice has ended, or is to end wherever it waits."""
        entry = self.entries.get(key[0])
        return entry is None or key[1] not in entry.choices or key[1] in entry.unavailable

    def close(self, key: Key) -> bool:
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
