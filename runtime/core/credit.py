"""Credits: how much may be under way on the edges into service operators."""

import math
from collections.abc import Iterable, Mapping

from sagellm.runtime.messages import Item, Prefilled, Request
from sagellm.runtime.operator import Credit
from sagellm.runtime.persistent import MutableMinTree

Gate = tuple[str, int]  # a service operator and its replica
ChoiceKey = tuple[str, int]  # a request and its choice
_Spent = dict[tuple[Gate, int], tuple[Credit, ...]]  # by gate and choice, of each item there

_ONE = Credit(1, 0, 0)


def cost_of(item: Item, block_size: int) -> Credit:
    """What an item takes of the receiver's credit: events and answers cost one request only."""
    request = item.request if isinstance(item, Prefilled) else item
    if not isinstance(request, Request):
        return _ONE
    num_known = len(request.prompt_token_ids) + len(request.emitted_token_ids)
    return Credit(1, num_known - request.num_cached_tokens, num_known // block_size + 1)


class NoCredit(Exception):
    """An item found no credit at the service operator `node`: the transaction is undone.

    `replica`: at the one where the item was placed; None: at no replica.
    """

    def __init__(self, node: str, replica: int | None) -> None:
        super().__init__(node, replica)
        self.node = node
        self.replica = replica


class Account:
    """The credit of one replica: what is left, and how many items have spent some of it."""

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
        """Spend a cost if it is covered; an item larger than all passes alone."""
        requests, tokens = self.requests - cost.requests, self.tokens - cost.tokens
        blocks = self.blocks - cost.blocks
        if self.num_items and (requests < 0 or tokens < 0 or blocks < 0):
            return False
        self.requests, self.tokens, self.blocks = requests, tokens, blocks
        self.num_items += 1
        return True

    def give(self, cost: Credit) -> None:
        """Return what an item spent."""
        self.num_items -= 1
        self.requests += cost.requests
        self.tokens += cost.tokens
        self.blocks += cost.blocks

    @property
    def room(self) -> float:
        """Blocks that a request may take now; infinite where nothing is under way, for then even
        an item larger than all passes; negative where no request may pass.
        """
        if not self.num_items:
            return math.inf
        return self.blocks if self.requests >= 1 else -math.inf


class ReservedCredit:
    """Credit that choices have spent at operators that they have not come to yet.

    `later`: for operators that requests enter, the one that decodes them, or others on the same
    engine. A request that enters the first spends credit at the second too, so that it finds a
    place there: what has none waits where it is queued.
    """

    def __init__(self, later: Mapping[str, str]) -> None:
        self.later = dict(later)
        self._gates: dict[ChoiceKey, Gate] = {}

    def add(self, gate: Gate, key: ChoiceKey) -> None:
        self._gates[key] = gate

    def remove(self, key: ChoiceKey) -> None:
        """The choice is there, or its credit has come back."""
        del self._gates[key]

    def is_at(self, gate: Gate, key: ChoiceKey) -> bool:
        return self._gates.get(key) == gate

    def gate_of(self, key: ChoiceKey) -> Gate | None:
        return self._gates.get(key)


class Gates:
    """The credit left for each service operator; every take can be taken back.

    `closed`: gates that take no requests, which may go elsewhere. `blocked`: operators that take
    nothing at all, but at `removed` gates: what was placed there must find out that it is lost.
    """

    def __init__(self, later: Mapping[str, str] | None = None) -> None:
        self.reserved = ReservedCredit(later or {})
        self.accounts: dict[Gate, Account] = {}
        self._rooms: dict[str, MutableMinTree] = {}  # by operator: -room of each replica
        self._spent: dict[str, _Spent] = {}  # by request
        self.closed: set[Gate] = set()
        self.blocked: frozenset[str] = frozenset()
        self.removed: set[Gate] = set()
        self.full: set[str] = set()  # operators of which no replica has room for a request

    def open(self, gate: Gate, capacity: Credit, block_size: int = 1) -> None:
        self.accounts[gate] = Account(capacity, block_size)
        self._rooms.setdefault(gate[0], MutableMinTree())
        self._note_room(gate)

    def close(self, gate: Gate) -> None:
        """Let no more requests in."""
        self.closed.add(gate)
        self._note_room(gate)

    def reopen(self, gate: Gate) -> None:
        self.closed.discard(gate)
        self._note_room(gate)

    def may_take(self, node: str, item: Item) -> bool:
        """Whether any replica of `node` might take an item. False is certain; True is not."""
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
        """The same of several operators."""
        for node in nodes:  # noqa: SIM110 (quicker)
            if self.may_take(node, item):
                return True
        return False

    def is_full(self, node: str) -> bool:
        """Whether no replica of `node` may take any request."""
        return self._rooms[node].minimum == math.inf

    def take(self, gate: Gate, item: Item, later: Gate | None = None) -> Gate | None:
        """Spend the item's cost, at once also at the gate `later`, where the item will come later.
        Returns the gate that has no credit for it; then nothing is spent. An item larger than all
        passes alone.

        Through a closed gate passes what has its place already, and cannot choose another: it
        comes back from there, if that is lost.
        """
        if (self.closed or self.blocked) and self._is_closed_to(gate, item):
            return gate
        key, block_size = item.key, self.accounts[gate].block_size
        cost = cost_of(item, block_size)
        if not self._spend(gate, key, cost):
            return gate
        if later is None:
            return None
        if self.accounts[later].block_size != block_size:
            cost = cost_of(item, self.accounts[later].block_size)
        if not self._spend(later, key, cost):
            self.give(gate, key)
            return later
        self.reserved.add(later, key)
        return None

    def give(self, gate: Gate, key: ChoiceKey) -> bool:
        """Return what the last item of `key` spent; False where it had spent nothing."""
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

    def holders(self, request_id: str, choice: int | None = None) -> tuple[tuple[Gate, int], ...]:
        """The gates that hold something of a request, each with the choice that it holds."""
        spent = self._spent.get(request_id, {})
        return tuple(place for place in spent if choice is None or place[1] == choice)

    def holds(self, request_id: str) -> bool:
        """Whether any gate holds something of a request."""
        return request_id in self._spent

    def _spend(self, gate: Gate, key: ChoiceKey, cost: Credit) -> bool:
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

    def _is_closed_to(self, gate: Gate, item: Item) -> bool:
        if gate[0] in self.blocked and gate not in self.removed:
            return True
        return gate in self.closed and not isinstance(item, Prefilled)

    def _note_room(self, gate: Gate) -> None:
        node, replica = gate
        rooms = self._rooms[node]
        rooms[replica] = math.inf if gate in self.closed else -self.accounts[gate].room
        if (rooms.minimum > -1) != (node in self.full):
            (self.full.discard if node in self.full else self.full.add)(node)
