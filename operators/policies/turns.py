"""The policies in which groups of requests take turns: `fair` (tenants) and `aegaeon` (models)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.operators.policies.order import USUAL_SPEED
from sagellm.operators.policies.request_queue import QueueEntry, QueueView
from sagellm.runtime.containers import SortedChunks
from sagellm.runtime.forecast import Forecast
from sagellm.runtime.messages import Request

# Round, turn and name of a tenant: the round in which it can pay for its first request.
_Visit: TypeAlias = tuple[int, int, str]
_Throttled: TypeAlias = tuple[float, str]  # until when, the name of a tenant


class Tenant(msgspec.Struct, frozen=True):
    """A tenant whose requests wait, as deficit round robin sees it. Immutable.

    `entries`: the waiting requests in the inner order. `deficit`: the tokens that the tenant may
    spend in round `round`, up to which it got its quanta. `turn`: its place within a round.
    `throttled`: given while it has exhausted its quota; otherwise `visit` is given.
    """

    entries: SortedChunks[QueueEntry]
    deficit: float
    round: int
    turn: int
    throttled: _Throttled | None = None
    visit: _Visit | None = None


class FairState(msgspec.Struct, frozen=True):
    """The state of `fair`. `round`: the latest round in which a request was sent.

    `visits`, `throttled`: those of all tenants, ascending. `paid_until_s`: by tenant with a quota,
    the time at which the quota has paid for all that was sent.
    """

    tenants: Map[str, Tenant] = Map()
    visits: SortedChunks[_Visit] = SortedChunks()
    throttled: SortedChunks[_Throttled] = SortedChunks()
    paid_until_s: Map[str, float] = Map()
    round: int = 0
    num_turns: int = 0


@dataclass(frozen=True)
class Fair:
    """Tenants take turns by tokens: deficit round robin, weighted, with optional quotas.

    A tenant is a `user_id` (behind the gateway: a key), or the value of the tag that `tenant`
    names. The cost of a request is its uncached prompt tokens plus `output_weight` * `max_tokens`.
    Tenants with waiting requests form a ring. In each round each tenant gets quantum_tokens *
    weight (`weights` by tenant, 1 for others), and sends requests while their cost is within what
    it has. What is left is kept for the next round, and lost when none of its requests waits. A
    tenant that comes joins the end of the ring, without credit for the time before. Within a tenant
    the order is `inner`: fifo, or priority with aging by `aging_s`.

    A tenant with w of the sum W of all weights gets the share w / W of all tokens sent, within one
    quantum and one request, as long as its requests wait. None starves: between two requests of a
    tenant, another one of weight v sends at most quantum * v * rounds and one request. The queue is
    work-conserving, except for quotas.

    `quotas`: tokens per second by tenant, `quota_burst_s` seconds of which may be spent at once. A
    tenant over its quota is delayed, not refused: a request within the quota's rate would otherwise
    need a client that retries; `expires_s` and admission bound the wait. In t seconds a tenant
    sends at most quota * (t + quota_burst_s) tokens and one request.

    Rounds that send nothing are skipped by arithmetic, so an input costs O(log tenants), whatever
    the quantum. Small quanta interleave tenants finely.

    Source: M. Shreedhar, G. Varghese, Efficient Fair Queueing Using Deficit Round Robin, SIGCOMM
    1995; Dynamo's router queue chooses between classes so. VTC (Y. Sheng et al., Fairness in
    Serving Large Language Models, OSDI 2024) is the alternative: it serves the tenant with the
    smallest count of tokens, charged as they are computed, and lifts the count of a tenant that
    comes. It needs the tokens of running answers, which this queue is not told.
    """

    tenant: str = "user_id"
    weights: Mapping[str, float] = field(default_factory=dict)
    quantum_tokens: int = field(default=512, metadata={"min": 1})
    output_weight: float = field(default=1.0, metadata={"min": 0.0})
    quotas: Mapping[str, float] = field(default_factory=dict)
    quota_burst_s: float = field(default=1.0, metadata={"min": 0.0})
    inner: Literal["fifo", "priority"] = "fifo"
    aging_s: float = field(default=10.0, metadata={"min": 0.0})

    def __post_init__(self) -> None:
        for option, values in (("weights", self.weights), ("quotas", self.quotas)):
            wrong = [name for name, value in values.items() if not 0 < value < math.inf]
            if wrong:
                raise ValueError(f"{option}: {wrong[0]!r} must have a number above 0")

    @property
    def initial(self) -> FairState:
        return FairState()

    def rank(
        self, state: FairState, request: Request, now: float, forecast: Forecast
    ) -> tuple[float, FairState]:
        levels = request.priority if self.inner == "priority" else 0
        return request.stamps.arrived_s + levels * self.aging_s, state

    def arrived(self, state: FairState, entry: QueueEntry, now: float) -> FairState:
        name = self._tenant_of(entry[3])
        tenant = state.tenants.get(name)
        if tenant is not None:
            entries = tenant.entries.inserted(entry)
            return self._changed(state, name, replace(tenant, entries=entries))
        until_s = state.paid_until_s.get(name, -math.inf)
        tenant = self._entering(state, name, SortedChunks((entry,)))
        if until_s > now:
            tenant = replace(tenant, throttled=(until_s, name))
        return self._changed(state, name, tenant)

    def left(self, state: FairState, entry: QueueEntry, now: float, was_taken: bool) -> FairState:
        name = self._tenant_of(entry[3])
        tenant = state.tenants[name]
        if was_taken:
            cost = self._cost(entry[3])
            tenant = self._paid(name, tenant, cost)
            state = replace(state, round=max(state.round, tenant.round))
            if name in self.quotas:
                state, tenant = self._charged(state, name, tenant, cost, now)
        return self._changed(state, name, replace(tenant, entries=tenant.entries.removed(entry)))

    def best(
        self, state: FairState, view: QueueView, number: int
    ) -> tuple[tuple[QueueEntry, ...], FairState]:
        state = self._released(state, view.now)
        visits = list(state.visits.head(number))  # later ones cannot be among the first `number`
        sent: dict[str, tuple[Tenant, tuple[QueueEntry, ...], int]] = {}
        found: list[QueueEntry] = []
        while visits:
            name = heappop(visits)[2]  # the list is sorted, so it is a heap
            tenant, waiting, place = sent.get(name) or self._waiting(state, name, number)
            found.append(waiting[place])
            if len(found) == number:
                break
            if place + 1 < len(waiting):
                tenant = self._paid(name, tenant, self._cost(waiting[place][3]))
                sent[name] = tenant, waiting, place + 1
                heappush(visits, self._visit(name, tenant, waiting[place + 1]))
        return tuple(found), state

    def _waiting(
        self, state: FairState, name: str, number: int
    ) -> tuple[Tenant, tuple[QueueEntry, ...], int]:
        tenant = state.tenants[name]
        return tenant, tenant.entries.head(number), 0

    def wake_at(self, state: FairState) -> float | None:
        first = state.throttled.first
        return None if first is None else first[0]

    def _tenant_of(self, request: Request) -> str:
        return request.user_id if self.tenant == "user_id" else request.tags.get(self.tenant, "")

    def _cost(self, request: Request) -> float:
        answer = self.output_weight * request.sampling.max_tokens
        return max(request.num_uncached_tokens, 1) + answer

    def _quantum(self, name: str) -> float:
        return self.quantum_tokens * self.weights.get(name, 1.0)

    def _num_rounds(self, name: str, tenant: Tenant, cost: float) -> int:
        """The rounds that must pass before the tenant can pay."""
        return max(math.ceil((cost - tenant.deficit) / self._quantum(name)), 0)

    def _paid(self, name: str, tenant: Tenant, cost: float) -> Tenant:
        """The tenant after it waited for its quanta, and paid."""
        rounds = self._num_rounds(name, tenant, cost)
        deficit = tenant.deficit + rounds * self._quantum(name) - cost
        return Tenant(tenant.entries, deficit, tenant.round + rounds, tenant.turn, tenant.throttled)

    def _visit(self, name: str, tenant: Tenant, entry: QueueEntry) -> _Visit:
        """When the tenant can pay for `entry`, its first request."""
        rounds = self._num_rounds(name, tenant, self._cost(entry[3]))
        return tenant.round + rounds, tenant.turn, name

    def _entering(self, state: FairState, name: str, entries: SortedChunks[QueueEntry]) -> Tenant:
        """A tenant at the end of the ring, with the quantum of this round."""
        return Tenant(entries, self._quantum(name), state.round, state.num_turns)

    def _changed(self, state: FairState, name: str, tenant: Tenant) -> FairState:
        """The state after a tenant came or changed."""
        before, first = state.tenants.get(name), tenant.entries.first
        if first is None:
            tenant = replace(tenant, throttled=None, visit=None)
        elif tenant.throttled is not None:
            tenant = replace(tenant, visit=None)
        else:
            tenant = replace(tenant, visit=self._visit(name, tenant, first))
        tenants = state.tenants.set(name, tenant)
        return FairState(
            tenants if first is not None else tenants.delete(name),
            _moved(state.visits, None if before is None else before.visit, tenant.visit),
            _moved(state.throttled, None if before is None else before.throttled, tenant.throttled),
            state.paid_until_s,
            state.round,
            max(state.num_turns, tenant.turn + 1),
        )

    def _charged(
        self, state: FairState, name: str, tenant: Tenant, cost: float, now: float
    ) -> tuple[FairState, Tenant]:
        """The state and the tenant after its quota was charged."""
        paid_s = max(state.paid_until_s.get(name, -math.inf), now - self.quota_burst_s)
        until_s = paid_s + cost / self.quotas[name]
        throttled = (until_s, name) if until_s > now else None
        state = replace(state, paid_until_s=state.paid_until_s.set(name, until_s))
        return state, replace(tenant, throttled=throttled)

    def _released(self, state: FairState, now: float) -> FairState:
        """The state after throttled tenants whose time has come joined the ring."""
        while (first := state.throttled.first) is not None and first[0] <= now:
            name = first[1]
            entries = state.tenants[name].entries
            state = self._changed(state, name, self._entering(state, name, entries))
        return state


def _moved(
    places: SortedChunks[Any], before: tuple[Any, ...] | None, after: tuple[Any, ...] | None
) -> SortedChunks[Any]:
    if before == after:
        return places
    if before is not None:
        places = places.removed(before)
    return places if after is None else places.inserted(after)


class Group(NamedTuple):
    """The youngest group of requests of a model. `num_tokens`: of all requests that joined it."""

    number: int
    num_tokens: int


class AegaeonState(msgspec.Struct, frozen=True):
    """The state of `aegaeon`. `groups`: by model. `current`: the group that is being served."""

    groups: Map[str, Group] = Map()
    num_groups: int = 0
    current: int = 0


@dataclass(frozen=True)
class Aegaeon:
    """Requests of several models on shared engines, grouped by model: groups go by arrival.

    A request joins the youngest group of its model, if that group is not full and no later group is
    being served; otherwise it opens a group at the end of the queue. Groups are served one after
    the other, the requests of a group by arrival, so an engine changes its model only between
    groups. A group is full when the uncached prompt tokens of all requests that ever joined it, the
    served ones too, reach the larger of

        quota_tokens
        the tokens computed in switch_s * (1 / switch_share - 1) seconds

    The second accounts for the cost of a switch: if an engine takes `switch_s` seconds to change
    its model, switches take at most the share `switch_share` of the time of full groups. Speeds are
    predicted from prefills. Groups are bounded, so no request starves: it waits for the groups that
    were opened before its own. The queue is work-conserving.

    Source: Aegaeon (Xiang et al., SOSP 2025). Taken from it: its prefill scheduling, FCFS over
    groups of one model whose accumulated size is bounded. Its bound is a number of requests; here
    it is a number of tokens, as prompts differ. Not taken: its choice of the instance with the
    least load for a new group (`route` chooses replicas); its decode scheduling, a weighted round
    robin between models with times from the TBT objective (an engine would have to change its model
    between two tokens); and the fast changes of models themselves, which are an engine's part.
    """

    quota_tokens: int = field(default=8192, metadata={"min": 1})
    switch_s: float = field(default=0.0, metadata={"min": 0.0})
    switch_share: float = field(default=0.1, metadata={"min": 0.001, "max": 1.0})

    @property
    def initial(self) -> AegaeonState:
        return AegaeonState()

    def rank(
        self, state: AegaeonState, request: Request, now: float, forecast: Forecast
    ) -> tuple[float, AegaeonState]:
        group = state.groups.get(request.model)
        if group is None or group.number < state.current or self._is_full(group, forecast):
            group = Group(state.num_groups, 0)
        group = Group(group.number, group.num_tokens + max(request.num_uncached_tokens, 1))
        groups = state.groups.set(request.model, group)
        num_groups = max(state.num_groups, group.number + 1)
        return float(group.number), AegaeonState(groups, num_groups, state.current)

    def left(
        self, state: AegaeonState, entry: QueueEntry, now: float, was_taken: bool
    ) -> AegaeonState:
        if not was_taken or entry[0] <= state.current:
            return state
        return replace(state, current=int(entry[0]))

    def _is_full(self, group: Group, forecast: Forecast) -> bool:
        predicted_s = forecast.prefill_s(self.quota_tokens)
        speed = self.quota_tokens / predicted_s if predicted_s else USUAL_SPEED
        amortised = self.switch_s * (1 / self.switch_share - 1) * speed
        return group.num_tokens >= max(self.quota_tokens, amortised)
