"""Credits: how much may be under way on the edges into service operators."""

import math

from sagellm.runtime.messages import Item, Prefilled, Request
from sagellm.runtime.min_tree import MinTree
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


class _Account:
    """The credit of one replica, and what each choice has spent of it."""

    __slots__ = ("block_size", "capacity", "left", "spent")

    def __init__(self, capacity: Credit, block_size: int) -> None:
        self.capacity = self.left = capacity
        self.block_size = block_size
        self.spent: dict[Key, tuple[Credit, ...]] = {}

    @property
    def room(self) -> float:
        """Blocks that a request may take now; infinite where nothing is under way, for then even
        an item larger than all passes; negative where no request may pass.
        """
        if not self.spent:
            return math.inf
        return self.left.blocks if self.left.requests >= 1 else -math.inf


class Gates:
    """The credit left for each service operator; every take can be taken back.

    `closed`: gates that take no requests, which may go elsewhere. `blocked`: operators that take
    nothing at all, but at `removed` gates: what was placed there must find out that it is lost.
    """

    def __init__(self) -> None:
        self._accounts: dict[Gate, _Account] = {}
        self._rooms: dict[str, MinTree] = {}  # by operator: -room of each replica
        self._holders: dict[str, dict[tuple[Gate, int], None]] = {}  # by request: gate, choice
        self.closed: set[Gate] = set()
        self.blocked: frozenset[str] = frozenset()
        self.removed: set[Gate] = set()

    def open(self, gate: Gate, capacity: Credit, block_size: int = 1) -> None:
        self._accounts[gate] = _Account(capacity, block_size)
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
        account = self._accounts[node, 0]
        return -rooms.minimum >= cost_of(item, account.block_size).blocks

    def take(self, gate: Gate, item: Item) -> bool:
        """Spend the item's cost if there is credit; an item larger than all passes alone.

        Through a closed gate passes what has its place already, and cannot choose another: it
        comes back from there, if that is lost.
        """
        if self._is_closed_to(gate, item):
            return False
        account = self._accounts[gate]
        cost = cost_of(item, account.block_size)
        if account.spent and not account.left.covers(cost):
            return False
        key = item.key
        account.spent[key] = (*account.spent.get(key, ()), cost)
        account.left -= cost
        self._holders.setdefault(key[0], {})[gate, key[1]] = None
        self._note_room(gate)
        return True

    def give(self, gate: Gate, key: Key) -> bool:
        """Return what the last item of `key` spent; False where it had spent nothing."""
        account = self._accounts[gate]
        costs = account.spent.get(key)
        if not costs:
            return False
        account.left += costs[-1]
        if len(costs) > 1:
            account.spent[key] = costs[:-1]
        else:
            del account.spent[key]
            self._drop_holder(gate, key)
        self._note_room(gate)
        return True

    def holders(self, request_id: str, choice: int | None = None) -> tuple[tuple[Gate, int], ...]:
        """The gates that hold something of a request, each with the choice that it holds."""
        held = self._holders.get(request_id)
        if not held:
            return ()
        return tuple(one for one in held if choice is None or one[1] == choice)

    def keys(self, gate: Gate) -> tuple[Key, ...]:
        """The choices of which a gate has something."""
        return tuple(self._accounts[gate].spent)

    def num_taken(self, gate: Gate) -> int:
        return len(self._accounts[gate].spent)

    def num_left(self, gate: Gate) -> float:
        """How many requests may be sent to a replica, its blocks apart."""
        return self._accounts[gate].left.requests

    def capacity(self, gate: Gate) -> Credit:
        return self._accounts[gate].capacity

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
        room = -math.inf if gate in self.closed else self._accounts[gate].room
        rooms = self._rooms.get(gate[0]) or MinTree()
        if rooms[gate[1]] != -room:
            self._rooms[gate[0]] = rooms.with_value(gate[1], -room)
