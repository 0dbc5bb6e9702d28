"""Credit: bounds the requests, tokens and blocks in transit to each replica."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from sagellm.runtime.containers import MutableMinTree
from sagellm.runtime.messages import ChoiceKey, Item, Prefilled, Request
from sagellm.runtime.operator import Credit


class CreditGate(NamedTuple):
    """One replica of a service operator; an item needs credit there to enter."""

    node: str
    replica: int


# (gate, choice) -> the cost of each item that holds credit there, in order of arrival.
_Spent: TypeAlias = dict[tuple[CreditGate, int], tuple[Credit, ...]]

_ONE = Credit(1, 0, 0)


def cost_of(item: Item, block_size: int) -> Credit:
    """The credit that an item takes; events and answers cost one request only."""
    request = item.request if isinstance(item, Prefilled) else item
    if not isinstance(request, Request):
        return _ONE
    num_known = len(request.prompt_token_ids) + len(request.emitted_token_ids)
    return Credit(1, num_known - request.num_cached_tokens, num_known // block_size + 1)


class NoCredit(Exception):
    """The service operator `node` has no credit for an item: the transaction must be undone.

    `replica`: the replica that the router had chosen; None: no replica of `node` has credit.
    """

    def __init__(self, node: str, replica: int | None) -> None:
        super().__init__(node, replica)
        self.node = node
        self.replica = replica


class Account:
    """The credit that one replica has left, and the number of items that hold credit there."""

    __slots__ = ("block_size", "blocks", "capacity", "num_items", "requests", "tokens")

    def __init__(self, capacity: Credit, block_size: int) -> None:
        self.capacity = capacity
        self.block_size = block_size
        self.num_items = 0
        self.requests, self.tokens, self.blocks = (
            capacity.requests,
            capacity.tokens,
            capacity.blocks,
        )

    def take(self, cost: Credit) -> bool:
        """Spend the cost of an item; False, with nothing spent, if the credit does not cover it.

        If no other item holds credit, any cost is covered: otherwise an item that exceeds the whole
        capacity could never enter.
        """
        requests, tokens = self.requests - cost.requests, self.tokens - cost.tokens
        blocks = self.blocks - cost.blocks
        if self.num_items and (requests < 0 or tokens < 0 or blocks < 0):
            return False
        self.requests, self.tokens, self.blocks = requests, tokens, blocks
        self.num_items += 1
        return True

    def give(self, cost: Credit) -> None:
        """Return the cost of an item."""
        self.num_items -= 1
        self.requests += cost.requests
        self.tokens += cost.tokens
        self.blocks += cost.blocks

    @property
    def room(self) -> float:
        """The blocks that a request may take now; minus infinity if no request may enter.

        Infinite on an idle replica, where even an item that exceeds the whole capacity may enter.
        """
        if not self.num_items:
            return math.inf
        return self.blocks if self.requests >= 1 else -math.inf


class ReservedCredit:
    """Credit that choices hold at an operator which they have not reached yet.

    `later`: the decode operator for each operator that takes requests, such as a prefill operator.
    A request that enters the first operator also takes credit at the decode operator, so that a
    finished prefill never waits for decode capacity. If either lacks credit, the request stays in
    its queue. An operator that shares its engine with the decode operator reserves there too.
    """

    def __init__(self, later: Mapping[str, str]) -> None:
        self.later = dict(later)
        self._gates: dict[ChoiceKey, CreditGate] = {}

    def add(self, gate: CreditGate, key: ChoiceKey) -> None:
        self._gates[key] = gate

    def remove(self, key: ChoiceKey) -> None:
        """Drop the reservation of a choice that has arrived, or whose credit was returned."""
        del self._gates[key]

    def is_at(self, gate: CreditGate, key: ChoiceKey) -> bool:
        return self._gates.get(key) == gate

    def gate_of(self, key: ChoiceKey) -> CreditGate | None:
        return self._gates.get(key)


class Gates:
    """The credit of all service operators. `give` undoes a `take`.

    `closed`: gates that take no new requests; a router may place the requests elsewhere.
    `unassigned`: gates that take none, because the replica has another role. `blocked`:
    operators that take no items at all, because an engine has no replica left. `removed`: gates of
    replicas that will not come back. These gates take items even in blocked operators: an item that
    was placed there must fail, so that it is placed again.
    """

    def __init__(self, later: Mapping[str, str] | None = None) -> None:
        self.reserved = ReservedCredit(later or {})
        self.accounts: dict[tuple[str, int], Account] = {}
        # By operator: minus the room of each replica, as the tree keeps a minimum, not a maximum.
        self._rooms: dict[str, MutableMinTree] = {}
        # By request id, so that a signal finds its gates without a search.
        self._spent: dict[str, _Spent] = {}
        self.closed: set[CreditGate] = set()
        self.unassigned: set[CreditGate] = set()
        self.blocked: frozenset[str] = frozenset()
        self.removed: set[CreditGate] = set()
        self.full: set[str] = set()  # operators without room for a request at any replica

    def open(self, gate: CreditGate, capacity: Credit, block_size: int = 1) -> None:
        """Add the gate of a replica that is up, with all its credit left."""
        self.accounts[gate] = Account(capacity, block_size)
        self._rooms.setdefault(gate.node, MutableMinTree())
        self._note_room(gate)

    def close(self, gate: CreditGate) -> None:
        """Admit no more requests at a gate."""
        self.closed.add(gate)
        self._note_room(gate)

    def reopen(self, gate: CreditGate) -> None:
        self.closed.discard(gate)
        self._note_room(gate)

    def assign(self, gate: CreditGate, *, is_on: bool) -> None:
        """Let the gate of a replica take new requests, or none."""
        (self.unassigned.discard if is_on else self.unassigned.add)(gate)
        if gate in self.accounts:
            self._note_room(gate)

    def may_take(self, node: str, item: Item) -> bool:
        """Whether any replica of `node` might take an item.

        A quick test that ignores tokens: False is certain, but `take` may refuse after True.
        """
        rooms = self._rooms.get(node)
        if rooms is None or isinstance(item, Prefilled):
            return True
        if node in self.blocked and not self.removed:
            return False
        room = -rooms.minimum
        if math.isinf(room):
            return room > 0
        return room >= cost_of(item, self.accounts[node, 0].block_size).blocks

    def may_take_at_any(self, nodes: Iterable[str], item: Item) -> bool:
        """Whether any replica of several operators might take an item."""
        for node in nodes:  # noqa: SIM110 (quicker)
            if self.may_take(node, item):
                return True
        return False

    def is_full(self, node: str) -> bool:
        """Whether no replica of `node` can take any request."""
        return self._rooms[node].minimum == math.inf

    def take(
        self, gate: CreditGate, item: Item, later: CreditGate | None = None
    ) -> CreditGate | None:
        """Spend the cost of an item at `gate`, and at the gate `later` that it will reach later.

        Returns None, or the gate without credit; then nothing is spent. A closed gate still admits
        a Prefilled, whose replica cannot be changed any more; the request returns if that replica
        is lost.
        """
        # Usually all sets are empty.
        is_usual = not (self.closed or self.blocked or self.unassigned)
        if not is_usual and self._is_closed_to(gate, item):
            return gate
        key, block_size = item.key, self.accounts[gate].block_size
        cost = cost_of(item, block_size)
        if not self._spend(gate, key, cost):
            return gate
        if later is None:
            return None
        if self.accounts[later].block_size != block_size:  # the cost in blocks differs
            cost = cost_of(item, self.accounts[later].block_size)
        if not self._spend(later, key, cost):
            self.give(gate, key)
            return later
        self.reserved.add(later, key)
        return None

    def give(self, gate: CreditGate, key: ChoiceKey) -> bool:
        """Return the cost of the last item of `key`; False if it held no credit at this gate."""
        request_id, choice = key
        spent, place = self._spent.get(request_id, {}), (gate, choice)
        if place not in spent:
            return False
        costs = spent[place]
        if len(costs) > 1:
            spent[place] = costs[:-1]
        elif len(spent) > 1:
            del spent[place]
        else:
            del self._spent[request_id]
        if self.reserved.is_at(gate, key):
            self.reserved.remove(key)
        self.accounts[gate].give(costs[-1])
        self._note_room(gate)
        return True

    def holders(
        self, request_id: str, choice: int | None = None
    ) -> tuple[tuple[CreditGate, int], ...]:
        """The gates at which a request holds credit, each with the choice that holds it."""
        spent = self._spent.get(request_id, {})
        return tuple(place for place in spent if choice is None or place[1] == choice)

    def holds(self, request_id: str) -> bool:
        """Whether a request holds credit at any gate."""
        return request_id in self._spent

    def _spend(self, gate: CreditGate, key: ChoiceKey, cost: Credit) -> bool:
        if not self.accounts[gate].take(cost):
            return False
        request_id, choice = key
        spent, place = self._spent.get(request_id), (gate, choice)
        if spent is None:
            self._spent[request_id] = {place: (cost,)}
        else:
            spent[place] = (*spent[place], cost) if place in spent else (cost,)
        self._note_room(gate)
        return True

    def _is_closed_to(self, gate: CreditGate, item: Item) -> bool:
        if gate.node in self.blocked and gate not in self.removed:
            return True
        if isinstance(item, Prefilled):
            return False
        return gate in self.closed or gate in self.unassigned

    def _note_room(self, gate: CreditGate) -> None:
        node, replica = gate
        rooms = self._rooms[node]
        is_shut = gate in self.closed or gate in self.unassigned
        rooms[replica] = math.inf if is_shut else -self.accounts[gate].room
        if (rooms.minimum > -1) != (node in self.full):
            (self.full.discard if node in self.full else self.full.add)(node)
