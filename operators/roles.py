"""roles: decides which replicas of one engine compute prompts, and which decode.

The engine is named by `prefill` and by `decode` (or `generate`) operators downstream. Each replica
has one role: it takes requests of `prefill`, or of the operators that decode. `route` must choose
replicas for each operator (`pools: operator`), and a `kv_transfer` must move the blocks between
replicas. Requests pass unchanged.

The roles follow the load, measured over some `interval_s` seconds:

    prefill   the share of first tokens that left other prompts waiting at their replica: the
              utilisation of the replicas that compute prompts
    decode    the running sequences, of those that the replicas hold, or the KV blocks in use, the
              larger share

A replica changes to the role whose load is above `high`, if the load of the other role without this
replica would still be below `high`. The replica with the least work changes; it takes no new
requests, and gets its new role when it has served what it has. Then roles stay for two intervals.
Where both roles are nearly full, each starves the other, which then looks idle: so a change back
waits twice as long as the change before, up to 32 intervals. A replica that is added decodes, a
lost one keeps its role. With fewer replicas than `min_prefill` + `min_decode` each has both roles.

Source: the consolidation check of Dynamo's planner (utilisation * N / (N - 1)); roles that change
with the load as in Splitwise's mixed pool (ISCA 2024); longer waits as in the damping of route
flaps (RFC 2439).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.runtime.feedback import (
    CreditChanged,
    HealthChanged,
    LoadReported,
    RoleAssigned,
    Topology,
)
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import (
    Arrival,
    Draw,
    Emit,
    Input,
    OperatorOutput,
    Report,
    Setup,
    Step,
    Target,
)
from sagellm.runtime.port import EngineLoad
from sagellm.runtime.service_limits import DECODING

PREFILL, DECODE = "prefill", "decode"
_HOLD = 2.0  # intervals without a change after a change
_MAX_HOLD = 32.0  # and after many changes back and forth


@dataclass(frozen=True, slots=True)
class RolesOptions:
    """`prefill_replicas`: the replicas that compute prompts at the beginning; None: half of them.
    `min_prefill`, `min_decode`: the fewest of each role. `max_decode_seqs`: the sequences with
    which a replica that decodes is full; None: `max_num_seqs` of the engine.
    """

    prefill_replicas: int | None = field(default=None, metadata={"min": 1})
    min_prefill: int = field(default=1, metadata={"min": 1})
    min_decode: int = field(default=1, metadata={"min": 1})
    interval_s: float = field(default=10.0, metadata={"min": 1e-3})
    high: float = field(default=0.8, metadata={"min": 0.1})
    max_decode_seqs: int | None = field(default=None, metadata={"min": 1})


SPEC = OpSpec(
    "roles",
    (Port("in", REQUEST),),
    (Port("out", REQUEST),),
    options=RolesOptions,
    subscribes=frozenset({"credit", "health", "load", "topology"}),
    signals=frozenset(),
)


class RolesState(msgspec.Struct, frozen=True):
    """The state of the operator. `removed`: replicas that will not come back. `roles`: of each
    replica whose gates were opened. `draining`: the replica that changes to its role in `roles`,
    and still serves its old one. `loads`: the latest load of each replica. `prefill`, `decode`: the
    measured loads of both roles. `seen_s`, `prefill_seen_s`: until when they were measured.
    `latest`: the role that the last replica got. `changed_s`: when that was. `hold`: the intervals
    before a change back.
    """

    removed: frozenset[int] = frozenset()
    roles: Map[int, str] = Map()
    draining: int | None = None
    loads: Map[int, EngineLoad] = Map()
    prefill: float = 0.0
    decode: float = 0.0
    seen_s: float = math.inf
    prefill_seen_s: float = math.inf
    latest: str = ""
    changed_s: float = -math.inf
    hold: float = _HOLD


@dataclass(frozen=True, slots=True)
class Roles:
    """Assigns roles to the replicas of `target`'s engine. `nodes`: the operators of each role.
    `num_prefill`: the replicas that compute prompts at the beginning; None: there are too few
    replicas, and each has both roles.
    """

    options: RolesOptions
    target: Target
    nodes: Mapping[str, tuple[str, ...]]
    num_prefill: int | None
    max_decode_seqs: int

    @property
    def initial(self) -> RolesState:
        return RolesState()

    def on(self, state: RolesState, happened: Input, now: float, draw: Draw) -> Step[RolesState]:
        match happened:
            case Arrival(item=Request() as request):
                return Step(state, (Emit(request),))
            case CreditChanged(node=node, replica=number) if not happened.request_id:
                return self._opened(state, node, number)
            case LoadReported(node=node, replica=number, load=load) if self._is_ours(node):
                return self._changed(self._measured(state, node, number, load, now), now)
            case HealthChanged(node=node, replica=number, is_up=False):
                return self._lost(state, node, number, now)
            case Topology(removed=removed):
                gone = (number for engine, number in removed if engine == self.target.engine)
                return Step(replace(state, removed=frozenset(gone)))
        return Step(state)

    def _is_ours(self, node: str) -> bool:
        return any(node in nodes for nodes in self.nodes.values())

    def _opened(self, state: RolesState, node: str, number: int) -> Step[RolesState]:
        """Close the gate of a replica that has just opened, unless it belongs to its role."""
        if not self._is_ours(node) or self.num_prefill is None:
            return Step(state)
        role = state.roles.get(number)
        if role is None:
            role = PREFILL if number < self.num_prefill else DECODE
            state = replace(state, roles=state.roles.set(number, role))
        if node in self.nodes[role]:
            return Step(state)
        return Step(state, (Report(RoleAssigned(operator=node, number=number, is_on=False)),))

    def _lost(self, state: RolesState, node: str, number: int, now: float) -> Step[RolesState]:
        """A lost replica has nothing left to serve. The gate of its old role is closed in any case,
        so only the operators of the new one tell of a loss.
        """
        if number != state.draining or node not in self.nodes[state.roles[number]]:
            return Step(state)
        return self._changed(replace(state, loads=state.loads.set(number, EngineLoad())), now)

    def _measured(
        self, state: RolesState, node: str, number: int, load: EngineLoad, now: float
    ) -> RolesState:
        """The state with one more report of a replica's load."""
        decode = state.decode + self._weight(state.seen_s, now) * (
            self._occupancy(state) - state.decode
        )
        loads = state.loads.set(number, load)
        state = replace(state, loads=loads, decode=decode, seen_s=now)
        if node not in self.nodes[PREFILL] or state.roles.get(number) != PREFILL:
            return state
        is_busy = load.num_running + load.num_waiting > 0
        weight = self._weight(state.prefill_seen_s, now)
        prefill = state.prefill + weight * (is_busy - state.prefill)
        return replace(state, prefill=prefill, prefill_seen_s=now)

    def _weight(self, seen_s: float, now: float) -> float:
        """The weight of what has held since `seen_s` in an exponential mean."""
        return 1 - math.exp(-max(now - seen_s, 0.0) / self.options.interval_s)

    def _of_role(self, state: RolesState, role: str) -> list[int]:
        """The replicas of a role that serve it."""
        return [
            number
            for number, found in state.roles.items()
            if found == role and number not in state.removed and number != state.draining
        ]

    def _occupancy(self, state: RolesState) -> float:
        """The share of what replicas that decode can hold that is in use now."""
        loads = [state.loads.get(one, EngineLoad()) for one in self._of_role(state, DECODE)]
        if not loads:
            return 0.0
        num_blocks = sum(load.num_blocks for load in loads)
        leased = sum(load.num_leased_blocks for load in loads) / num_blocks if num_blocks else 0.0
        num_running = sum(load.num_running for load in loads)
        return max(num_running / (len(loads) * self.max_decode_seqs), leased)

    def _changed(self, state: RolesState, now: float) -> Step[RolesState]:
        """End a change of roles, or begin one, if it is time."""
        if state.draining is not None:
            load = state.loads.get(state.draining, EngineLoad())
            if load.num_running + load.num_waiting:
                return Step(state)
            opened = tuple(self._assign(state.roles[state.draining], state.draining, is_on=True))
            return Step(replace(state, draining=None, changed_s=now), opened)
        role = self._wanted(state)
        if role is None:
            return Step(state)
        is_back, intervals = (
            state.latest not in ("", role),
            (now - state.changed_s) / self.options.interval_s,
        )
        hold = state.hold if is_back else _HOLD
        if intervals < hold:
            return Step(state)
        other = DECODE if role == PREFILL else PREFILL
        number = min(self._of_role(state, other), key=lambda one: (_work(state.loads, one), one))
        after = replace(
            state,
            roles=state.roles.set(number, role),
            draining=number,
            latest=role,
            hold=min(2 * hold, _MAX_HOLD) if is_back and intervals < 2 * hold else _HOLD,
        )
        return Step(after, tuple(self._assign(other, number, is_on=False)))

    def _wanted(self, state: RolesState) -> str | None:
        """The role that one more replica should have; None: no change."""
        high, options = self.options.high, self.options
        counts = {role: len(self._of_role(state, role)) for role in (PREFILL, DECODE)}
        loads, least = (
            {PREFILL: state.prefill, DECODE: state.decode},
            {
                PREFILL: options.min_prefill,
                DECODE: options.min_decode,
            },
        )
        for role, other in ((PREFILL, DECODE), (DECODE, PREFILL)):
            if loads[role] > high and counts[other] > least[other]:
                without = loads[other] * counts[other] / (counts[other] - 1)
                return role if without < high else None
        return None

    def _assign(self, role: str, number: int, *, is_on: bool) -> Iterator[OperatorOutput]:
        for node in self.nodes[role]:
            yield Report(RoleAssigned(operator=node, number=number, is_on=is_on))


def _work(loads: Mapping[int, EngineLoad], number: int) -> int:
    load = loads.get(number, EngineLoad())
    return load.num_running + load.num_waiting


def build(options: RolesOptions, setup: Setup) -> Roles:
    """Make the operator. Raises ValueError unless one engine has both roles."""
    computing = {one.engine: one for one in setup.targets if one.op == PREFILL}
    decoding = [one for one in setup.targets if one.op in DECODING and one.engine in computing]
    engines = {one.engine for one in decoding}
    if len(engines) != 1:
        raise ValueError(
            f"{setup.name}: {len(engines)} engines are used by prefill and by decode or generate: "
            "name one engine in both"
        )
    (engine,) = engines
    target = computing[engine]
    nodes = {
        PREFILL: tuple(
            one.node for one in setup.targets if one.op == PREFILL and one.engine == engine
        ),
        DECODE: tuple(one.node for one in decoding),
    }
    if target.num_replicas < options.min_prefill + options.min_decode:
        return Roles(options, target, nodes, None, 1)
    wanted = options.prefill_replicas or target.num_replicas // 2
    num_prefill = min(max(wanted, options.min_prefill), target.num_replicas - options.min_decode)
    facts = setup.facts.get(engine)
    most = options.max_decode_seqs or (facts.max_num_seqs if facts is not None else 256)
    return Roles(options, target, nodes, num_prefill, most)
