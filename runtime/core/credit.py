"""Credits: how much may be under way on the edges into service operators."""

import math
from collections.abc import Mapping

from sagellm.runtime.messages import Item, Prefilled, Request
from sagellm.runtime.min_tree import MutableMinTree
from sagellm.runtime.operator import Credit

Gate = tuple[str, int]  # a service operator and its replica
Key = tuple[str, int]  # a request and its choice

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
    """The credit of one replica, and what each choice has spent of it."""

    __slots__ = ("block_size", "blocks", "capacity", "requests", "spent", "tokens")

    def __init__(self, capacity: Credit, block_size: int) -> None:
        self.capacity = capacity
        self.block_size = block_size
        self.requests, self.tokens, self.blocks = (
            capacity.requests,
            capacity.tokens,
            capacity.blocks,
        )
        self.spent: dict[Key, list[Credit]] = {}

    def take(self, key: Key, cost: Credit) -> bool:
        """Spend a cost if it is covered; an item larger than all passes alone."""
        requests, tokens = self.requests - cost.requests, self.tokens - cost.tokens
        blocks = self.blocks - cost.blocks
        if self.spent and (requests < 0 or tokens < 0 or blocks < 0):
            return False
        self.requests, self.tokens, self.blocks = requests, tokens, blocks
        self.spent.setdefault(key, []).append(cost)
        return True

    def give(self, key: Key) -> None:
        """Return what the last item of `key` spent."""
        costs = self.spent[key]
        cost = costs.pop()
        if not costs:
            del self.spent[key]
        self.requests += cost.requests
        self.tokens += cost.tokens
        self.blocks += cost.blocks

    @property
    def room(self) -> float:
        """Blocks that a request may take now; infinite where nothing is under way, for then even
        an item larger than all passes; negative where no request may pass.
        """
        if not self.spent:
            return math.inf
        return self.blocks if self.requests >= 1 else -math.inf


class Reserved:
    """Credit that choices have spent at operators that they have not come to yet.

    `later`: for operators that requests enter, the one that decodes them, or others on the same
    engine. A request that enters the first spends credit at the second too, so that it finds a
    place there: what has none waits where it is queued.
    """

    def __init__(self, later: Mapping[str, str]) -> None:
        self.later = dict(later)
        self._gates: dict[Key, Gate] = {}

    def add(self, gate: Gate, key: Key) -> None:
        self._gates[key] = gate

    def remove(self, key: Key) -> None:
        """The choice is there, or its credit has come back."""
        del self._gates[key]

    def is_at(self, gate: Gate, key: Key) -> bool:
        return self._gates.get(key) == gate

    def gate_of(self, key: Key) -> Gate | None:
        return self._gates.get(key)


class Gates:
    """The credit left for each service operator; every take can be taken back.

    `closed`: gates that take no requests, which may go elsewhere. `blocked`: operators that take
    nothing at all, but at `removed` gates: what was placed there must find out that it is lost.
    """

    def __init__(self, later: Mapping[str, str] | None = None) -> None:
        self.reserved = Reserved(later or {})
        self.accounts: dict[Gate, Account] = {}
        self._rooms: dict[str, MutableMinTree] = {}  # by operator: -room of each replica
        self._holders: dict[str, dict[tuple[Gate, int], None]] = {}  # by request: gate, choice
        self.closed: set[Gate] = set()
        self.blocked: frozenset[str] = frozenset()
        self.removed: set[Gate] = set()
        self.full: set[str] = set()  # operators of which no replica has room for a request
        self.full_changed = False  # since whoever acts on it has set it to False

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

    def is_full(self, node: str) -> bool:
        """Whether no replica of `node` may take any request."""
        return self._rooms[node].minimum == math.inf

    def take(self, gate: Gate, item: Item, *, later: bool = False) -> bool:
        """Spend the item's cost if there is credit; an item larger than all passes alone.

        Through a closed gate passes what has its place already, and cannot choose another: it
        comes back from there, if that is lost. `later`: the item will come there later.
        """
        if (self.closed or self.blocked) and not later and self._is_closed_to(gate, item):
            return False
        account, key = self.accounts[gate], item.key
        if not account.take(key, cost_of(item, account.block_size)):
            return False
        if later:
            self.reserved.add(gate, key)
        self._holders.setdefault(key[0], {})[gate, key[1]] = None
        self._note_room(gate)
        return True

    def give(self, gate: Gate, key: Key) -> bool:
        """Return what the last item of `key` spent; False where it had spent nothing."""
        account = self.accounts[gate]
        if key not in account.spent:
            return False
        account.give(key)
        if self.reserved.is_at(gate, key):
            self.reserved.remove(key)
        if key not in account.spent:
            self._drop_holder(gate, key)
        self._note_room(gate)
        return True

    def holders(self, request_id: str, choice: int | None = None) -> tuple[tuple[Gate, int], ...]:
        """The gates that hold something of a request, each with the choice that it holds."""
        held = self._holders.get(request_id)
        if not held:
            return ()
        return tuple(one for one in held if choice is None or one[1] == choice)

    def holds(self, request_id: str) -> bool:
        """Whether any gate holds something of a request."""
        return request_id in self._holders

    def _is_closed_to(self, gate: Gate, item: Item) -> bool:
        if gate[0] in self.blocked and gate not in self.removed:
            return True
        return gate in self.closed and not isinstance(item, Prefilled)

    def _drop_holder(self, gate: Gate, key: Key) -> None:
        held = self._holders[key[0]]
        held.pop((gate, key[1]), None)
        if not held:
            del self._holders[key[0]]

    def _note_room(self, gate: Gate) -> None:
        node, rooms = gate[0], self._rooms[gate[0]]
        rooms[gate[1]] = math.inf if gate in self.closed else -self.accounts[gate].room
        if (rooms.minimum > -1) != (node in self.full):
            (self.full.discard if node in self.full else self.full.add)(node)
            self.full_changed = True
