"""Preemption across the graph: a waiting request takes the place of running ones of lower classes.

An operator with a queue claims a place for a waiting request (`Offer.claims`). The core chooses the
victims among the requests that the operators with engines hold, and recalls them with the effect
`Preempt`. A victim comes back with its emitted tokens, waits in its queue, and resumes.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from sagellm.runtime.core.accounting import Ledger
from sagellm.runtime.core.credit import CreditClaimed, CreditGate, Gates, would_take
from sagellm.runtime.core.effects import Preempt, Reaction, Send
from sagellm.runtime.core.request_lifecycle import Register
from sagellm.runtime.messages import PRIORITIES, ChoiceKey, Prefilled, Request
from sagellm.runtime.operator import Claim
from sagellm.runtime.plan import Plan

MAX_PREEMPTIONS = 5  # of one choice; then it keeps its place until it ends
_NUM_COMPARED = 64  # of a class, the requests that were sent last


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """A request at an operator with an engine; only requests that may be preempted are kept."""

    gate: CreditGate
    request: Request


def _victims(operator: Any) -> Iterator[int]:
    """The priorities that the option `preempts` of an operator names as victims."""
    table = getattr(getattr(operator, "options", None), "preempts", None)
    names = table.values() if isinstance(table, Mapping) else ()
    return (PRIORITIES[name] for name in names if name in PRIORITIES)


class RunningRequests:
    """The requests at operators with engines that may be preempted, and the choice among them."""

    def __init__(self, gates: Gates, num_emitted: Callable[[ChoiceKey], int]) -> None:
        self._gates = gates
        self._num_emitted = num_emitted
        # By operator and priority, in the order in which they were sent.
        self._by_node: dict[str, dict[int, dict[ChoiceKey, RunningRequest]]] = {}

    def __len__(self) -> int:
        return sum(len(each) for classes in self._by_node.values() for each in classes.values())

    def add(self, running: RunningRequest) -> None:
        classes = self._by_node.setdefault(running.gate.node, {})
        classes.setdefault(running.request.priority, {})[running.request.key] = running

    def remove(self, node: str, key: ChoiceKey) -> bool:
        """Remove a request. Returns False if it is not at the operator, or not kept here."""
        classes = self._by_node.get(node, {})
        return any(running.pop(key, None) is not None for running in classes.values())

    def choose(self, node: str, claim: Claim) -> list[RunningRequest]:
        """The first requests, all at one replica of `node`, whose credit covers the claimed one;
        empty if there are none.
        """
        by_gate: dict[CreditGate, list[RunningRequest]] = {}
        for running in self._candidates(node, claim.least_priority):
            chosen = by_gate.setdefault(running.gate, [])
            chosen.append(running)
            keys = [one.request.key for one in chosen]
            if would_take(self._gates, running.gate, claim.request, keys):
                return chosen
        return []

    def num_tokens(self, running: RunningRequest) -> int:
        """The tokens that have to be computed again, if no engine has them cached."""
        request = running.request
        return len(request.prompt_token_ids) + self._num_emitted(request.key)

    def _candidates(self, node: str, least_priority: int) -> Iterator[RunningRequest]:
        """The requests at an operator that may be preempted, the best first."""
        classes = self._by_node.get(node, {})
        for priority in sorted(classes, reverse=True):
            if priority >= least_priority:
                latest = reversed(tuple(classes[priority].values()))
                compared = sorted(islice(latest, _NUM_COMPARED), key=self.num_tokens)
                yield from self._at_open_gates((*compared, *latest))

    def _at_open_gates(self, running: Iterable[RunningRequest]) -> Iterator[RunningRequest]:
        """Skip requests whose place would go to nobody, because their replica is lost or drains."""
        return (one for one in running if one.gate not in self._gates.closed)


@dataclass(slots=True)
class _OpenClaim:
    """A claim, and the victims that have not come back yet. `due_s`: when it stops waiting for a
    place that becomes free by itself.
    """

    node: str
    claim: Claim
    due_s: float = math.inf
    victims: set[ChoiceKey] = field(default_factory=set)


class Preemption:
    """Chooses the victims of claims, and counts them by priority in `num_preempted`.

    Victims are of the lowest class that runs. Of its requests that were sent last, the victim is
    the one with the fewest tokens to compute again. If a place is predicted to become free sooner
    than these tokens can be computed again, the claim waits, but no longer than that time.
    `is_enabled`: whether any operator has the option `preempts`; otherwise no other member must be
    used.
    """

    def __init__(
        self,
        plan: Plan,
        reaction: Reaction,
        gates: Gates,
        ledger: Ledger,
        register: Register,
    ) -> None:
        victims = [*chain.from_iterable(map(_victims, plan.logic.values()))]
        self.is_enabled = bool(victims)
        self.num_preempted: Counter[int] = Counter()
        self._least_priority = min(victims, default=0)
        self._reaction = reaction
        self._gates = gates
        self._is_open = register.is_open
        self._running = RunningRequests(gates, ledger.position)
        self._claims: dict[ChoiceKey, _OpenClaim] = {}
        self._claimants: dict[tuple[CreditGate, ChoiceKey], ChoiceKey] = {}  # by victim
        # How often each choice was preempted; by request id, to forget a request at once.
        self._times: dict[str, Counter[int]] = {}
        self._due: list[tuple[float, ChoiceKey]] = []  # a heap; may hold claims that are over
        self.due_changed = False  # whether `next_due_s` may have changed since it was read

    def sent(self, send: Send) -> None:
        """Record that a request has entered an operator; its claim is over."""
        item, gate = send.item, CreditGate(send.node, send.replica)
        request = item.request if isinstance(item, Prefilled) else item
        if not isinstance(request, Request):
            return
        key = request.key
        if self._claims.pop(key, None) is not None:
            self.due_changed = True
        if gate not in self._gates.resuming or request.priority < self._least_priority:
            return
        if request.can_be_preempted is not False and self.num_times(key) < MAX_PREEMPTIONS:
            self._running.add(RunningRequest(gate, request))

    def released(self, gate: CreditGate, key: ChoiceKey) -> None:
        """Record that a request has left an operator. To be called after its credit was returned,
        and before the return is reported: the claimant may claim again.
        """
        if self._running.remove(gate.node, key):
            return
        claimant = self._claimants.pop((gate, key), None)
        claim = None if claimant is None else self._claims.get(claimant)
        if claim is not None and claimant is not None:
            claim.victims.discard(key)
            if not claim.victims:
                del self._claims[claimant]

    def returned(self, request: Request) -> None:
        """Count a victim that came back."""
        self.num_preempted[request.priority] += 1
        self._times.setdefault(request.request_id, Counter())[request.choice] += 1

    def num_times(self, key: ChoiceKey) -> int:
        """How often an open choice was preempted."""
        return self._times[key[0]][key[1]] if key[0] in self._times else 0

    def forget(self, request_id: str) -> None:
        """Drop what is known of a request that has ended."""
        self._times.pop(request_id, None)
        for key in [key for key in self._claims if key[0] == request_id]:
            del self._claims[key]

    def claim(self, claimed: CreditClaimed) -> None:
        """Preempt for a waiting request, now or when the claim is due. Without victims the claim is
        over: the operator claims again with its next offer.
        """
        key = claimed.claim.request.key
        if key not in self._claims:
            self._claims[key] = _OpenClaim(claimed.node, claimed.claim)
            self._serve(key, self._claims[key])

    @property
    def next_due_s(self) -> float:
        """When the next waiting claim is due; infinite without one."""
        self.due_changed = False
        while self._due and not self._is_due(*self._due[0]):
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else math.inf

    def take_due(self, now: float) -> None:
        """Preempt for the claims that are due."""
        while self.next_due_s <= now:
            key = heapq.heappop(self._due)[1]
            self._serve(key, self._claims[key])

    def _is_due(self, due_s: float, key: ChoiceKey) -> bool:
        claim = self._claims.get(key)
        return claim is not None and claim.due_s == due_s and not claim.victims

    def _serve(self, key: ChoiceKey, opened: _OpenClaim) -> None:
        node = self._full_node(opened)
        victims = self._running.choose(node, opened.claim) if self._is_open(key) else []
        if not victims:
            del self._claims[key]
            return
        cost_s = opened.claim.token_s * sum(map(self._running.num_tokens, victims))
        if opened.due_s == math.inf and opened.claim.wait_s < cost_s:
            opened.due_s = self._reaction.now + cost_s
            heapq.heappush(self._due, (opened.due_s, key))
            self.due_changed = True
            return
        for victim in victims:
            self._preempt(victim, key)
            opened.victims.add(victim.request.key)

    def _preempt(self, victim: RunningRequest, claimant: ChoiceKey) -> None:
        gate, key = victim.gate, victim.request.key
        self._running.remove(gate.node, key)
        self._claimants[gate, key] = claimant
        self._reaction.effects.append(Preempt(gate.node, gate.replica, *key))

    def _full_node(self, opened: _OpenClaim) -> str:
        """The operator that has no room: the one that refused, or its decode operator."""
        decoder = self._gates.reserved.later.get(opened.node)
        if decoder is None or not self._gates.may_take(opened.node, opened.claim.request):
            return opened.node
        return decoder
