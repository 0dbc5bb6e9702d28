"""What a router knows of the replicas that it chooses over."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from sagellm.runtime.engine.port import EngineLoad
from sagellm.runtime.messages import Request
from sagellm.runtime.persistent_map import PersistentMap

Replica = tuple[str, int]  # a pool (an engine, or a node without one) and a number in it


def tokens_of(request: Request) -> int:
    """What a request may cost a replica: its prompt to compute, and its answer at the longest."""
    return request.num_uncached_tokens + request.sampling.max_tokens


class Backlog(msgspec.Struct, frozen=True):
    """What this router sent to one replica.

    `num_open` and `num_tokens`: of requests that have not ended. `num_held`: requests less
    credits that came back. A prefill returns its credit long before the request ends; a request
    that ends on its way never had credit here, so this count may be too high, never too low.
    """

    num_open: int = 0
    num_tokens: int = 0
    num_held: int = 0

    @property
    def load(self) -> float:
        """Outstanding tokens, as far as the replica still holds the requests."""
        return self.num_tokens * min(self.num_held, self.num_open) / max(self.num_open, 1)

    def placed(self, num_tokens: int) -> "Backlog":
        return Backlog(self.num_open + 1, self.num_tokens + num_tokens, self.num_held + 1)

    def forgotten(self, num_tokens: int) -> "Backlog":
        return replace(
            self, num_open=self.num_open - 1, num_tokens=self.num_tokens - num_tokens
        ).settled()

    def returned(self) -> "Backlog":
        return replace(self, num_held=max(self.num_held - 1, 0))

    def settled(self) -> "Backlog":
        """With nothing open nothing is held: errors of the count end here."""
        return self if self.num_open else Backlog()


class Report(NamedTuple):
    """A load as an operator told it."""

    node: str
    sequence: int
    load: EngineLoad


class View(msgspec.Struct, frozen=True):
    """The state of a router. `placed`: request -> where its choices went, and their tokens."""

    num_routed: int = 0
    backlogs: Mapping[Replica, Backlog] = msgspec.field(default_factory=dict)
    reported: Mapping[Replica, Report] = msgspec.field(default_factory=dict)
    down: frozenset[Replica] = frozenset()  # whose engine is lost, until it is back
    removed: frozenset[Replica] = frozenset()  # not to come back
    added: Mapping[str, int] = msgspec.field(default_factory=dict)  # pool -> replicas it has by now
    placed: PersistentMap[str, tuple[tuple[Replica, int], ...]] = msgspec.field(
        default_factory=PersistentMap
    )

    def load(self, replica: Replica, request: Request) -> float:
        """Outstanding tokens of this router, and those of others' requests as reported.

        A request of others (they share the engine) counts as much as the one in hand.
        """
        backlog = self.backlogs.get(replica, Backlog())
        if replica not in self.reported:
            return backlog.load
        engine = self.reported[replica].load
        num_foreign = engine.num_running + engine.num_waiting - backlog.num_held
        return backlog.load + max(num_foreign, 0) * tokens_of(request)

    def place(self, request: Request, replicas: tuple[Replica, ...]) -> "View":
        num_tokens = tokens_of(request)
        backlogs = dict(self.backlogs)
        for replica in replicas:
            backlogs[replica] = backlogs.get(replica, Backlog()).placed(num_tokens)
        before = self.placed.get(request.request_id, ())
        where = before + tuple((replica, num_tokens) for replica in replicas)
        return replace(
            self,
            num_routed=self.num_routed + 1,
            backlogs=backlogs,
            placed=self.placed.with_item(request.request_id, where),
        )

    def forget(self, request_id: str) -> "View":
        """Its last event has passed: whatever it took is free."""
        if request_id not in self.placed:
            return self
        backlogs = dict(self.backlogs)
        for replica, num_tokens in self.placed[request_id]:
            backlogs[replica] = backlogs[replica].forgotten(num_tokens)
        return replace(self, backlogs=backlogs, placed=self.placed.without(request_id))

    def take_back(self, replica: Replica) -> "View":
        """A replica returned the credit of one request."""
        if replica not in self.backlogs:
            return self
        return replace(self, backlogs={**self.backlogs, replica: self.backlogs[replica].returned()})

    def mark(self, replica: Replica, *, is_up: bool) -> "View":
        """Its engine is back, or is lost: either way without what it had. One that nobody knew is
        there from now on.
        """
        pool, number = replica
        return replace(
            self,
            down=self.down - {replica} if is_up else self.down | {replica},
            removed=self.removed - {replica} if is_up else self.removed,
            reported={known: report for known, report in self.reported.items() if known != replica},
            added={**self.added, pool: max(self.added.get(pool, 0), number + 1)},
        )

    def remove(self, replica: Replica) -> "View":
        """Nothing goes there any more, whatever is missing."""
        return replace(self, down=self.down | {replica}, removed=self.removed | {replica})

    def report(self, replica: Replica, report: Report) -> "View":
        """The latest load wins; one that a later one of its node overtook changes nothing."""
        known = self.reported.get(replica)
        if known and known.node == report.node and report.sequence <= known.sequence:
            return self
        return replace(self, reported={**self.reported, replica: report})


@dataclass(frozen=True, slots=True)
class Pool:
    """The replicas to choose over: those of one engine, whichever operators use it.

    `num_replicas`: at first; see `View.added`.
    """

    name: str
    num_replicas: int
    nodes: tuple[str, ...]

    def size(self, view: View) -> int:
        """How many replicas it has had: numbers are 0 ... size - 1."""
        return max(self.num_replicas, view.added.get(self.name, 0))

    def live(self, view: View) -> tuple[int, ...]:
        """The replicas whose engine is there; where none is, all that may come back: the request
        waits for one.
        """
        every = tuple(range(self.size(view)))
        if not view.down:
            return every
        wanted = tuple(number for number in every if (self.name, number) not in view.removed)
        return tuple(number for number in wanted if (self.name, number) not in view.down) or wanted

    def least_loaded(self, request: Request, view: View) -> int:
        """Ties go round, so that an idle pool fills evenly."""
        live = self.live(view)
        turn = view.num_routed % len(live)
        order = live[turn:] + live[:turn]
        loads = {number: view.load((self.name, number), request) for number in order}
        return min(loads, key=loads.__getitem__)
