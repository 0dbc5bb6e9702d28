"""The ledger: every accepted request ends once, and its tokens come in order without a gap."""

from collections import Counter
from dataclasses import dataclass, field

from sagellm.runtime.messages import Answer, Forked, Item, TokenEvent

Key = tuple[str, int]


class LedgerError(AssertionError):
    """The books do not balance: a fault of sagellm, never of its user."""


@dataclass(slots=True)
class Ledger:
    """Counts what came in and what went out; `check` raises LedgerError where they differ."""

    gaps: bool = False  # a user's filter or map may leave tokens out
    num_accepted: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    _next_position: dict[Key, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def num_open(self) -> int:
        return len(self._next_position)

    def accept(self, key: Key, *, position: int = 0) -> None:
        """A choice enters; `position` is that of its first new token."""
        self.num_accepted += 1
        if key in self._next_position:
            self.faults.append(f"{key} was accepted twice")
        self._next_position[key] = position

    def fork(self, forked: Forked) -> None:
        """The one choice of a request became several."""
        for choice in range(forked.num_choices):
            if (forked.request_id, choice) not in self._next_position:
                self.accept((forked.request_id, choice))

    def record(self, item: Item) -> None:
        """An item reached the sink."""
        if isinstance(item, TokenEvent):
            self.record_tokens(item)
        elif item.key not in self._next_position:
            self._miss(item)
        elif isinstance(item, Answer):
            self.num_tokens += item.num_tokens
            self._end(item.key, item.finish_reason)

    def record_tokens(self, event: TokenEvent) -> None:
        """Tokens reached the sink, or the end of a choice."""
        key, position = event.key, event.position
        num_tokens = len(event.token_ids) + event.num_tokens_without_ids
        expected = self._next_position.get(key)
        if expected is None:
            self._miss(event)
            return
        if position != expected and num_tokens and (position < expected or not self.gaps):
            self.faults.append(f"{key} gave position {position}, not {expected}")
        self._next_position[key] = position + num_tokens
        self.num_tokens += num_tokens
        if event.finish_reason is not None:
            self._end(key, event.finish_reason)

    def _miss(self, item: Item) -> None:
        self.faults.append(f"{item.key} had no request, or had ended")

    def _end(self, key: Key, reason: str) -> None:
        del self._next_position[key]
        self.ended[reason] += 1

    def check(self) -> None:
        """At rest: accepted = ended, nothing open, no fault. Raises LedgerError."""
        if self._next_position:
            self.faults.append(f"never ended: {sorted(self._next_position)[:8]}")
        if self.num_accepted != self.ended.total():
            self.faults.append(f"{self.num_accepted} accepted, {self.ended.total()} ended")
        if self.faults:
            raise LedgerError("; ".join(self.faults))
