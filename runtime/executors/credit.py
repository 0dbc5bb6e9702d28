"""Credits: how much may be under way on the edges into service operators."""

import math

from sagellm.runtime.messages import Item, Prefilled, Request
from sagellm.runtime.operator import Credit

Gate = tuple[str, int]  # a service operator and its replica


def cost_of(item: Item, block_size: int) -> Credit:
    """What an item takes of the receiver's credit: events and answers cost one request only."""
    request = item.request if isinstance(item, Prefilled) else item
    if not isinstance(request, Request):
        return Credit(1, 0, 0)
    num_known = len(request.prompt_token_ids) + len(request.emitted_token_ids)
    return Credit(1, request.num_uncached_tokens, math.ceil((num_known + 1) / block_size))


class Gates:
    """The credit left for each service operator; every take can be taken back."""

    def __init__(self) -> None:
        self._capacity: dict[Gate, Credit] = {}
        self._left: dict[Gate, Credit] = {}
        self._block_size: dict[Gate, int] = {}
        self._spent: dict[Gate, dict[tuple[str, int], list[Credit]]] = {}
        self.shut: frozenset[Gate] = frozenset()  # to requests, which may go elsewhere
        self.locked: frozenset[Gate] = frozenset()  # to everything, for there is no elsewhere

    def open(self, gate: Gate, capacity: Credit, block_size: int = 1) -> None:
        self._capacity[gate] = self._left[gate] = capacity
        self._block_size[gate] = block_size
        self._spent[gate] = {}

    def take(self, gate: Gate, item: Item) -> bool:
        """Spend the item's cost if there is credit; an item larger than all passes alone.

        Through a gate that is shut passes what has its place already, and cannot choose another: it
        comes back from there, if that is lost.
        """
        if gate in self.locked or (gate in self.shut and not isinstance(item, Prefilled)):
            return False
        cost = cost_of(item, self._block_size[gate])
        alone = not self._spent[gate]
        if not alone and not self._left[gate].covers(cost):
            return False
        self._spent[gate].setdefault(item.key, []).append(cost)
        self._left[gate] -= cost
        return True

    def give(self, gate: Gate, key: tuple[str, int]) -> bool:
        """Return what the last item of `key` spent; False where it had spent nothing."""
        costs = self._spent[gate].get(key)
        if not costs:
            return False
        self._left[gate] += costs.pop()
        if not costs:
            del self._spent[gate][key]
        return True

    def holds(self, gate: Gate, key: tuple[str, int]) -> bool:
        return key in self._spent[gate]

    def keys(self, gate: Gate) -> tuple[tuple[str, int], ...]:
        """The choices of which a gate has something."""
        return tuple(self._spent[gate])

    def num_taken(self, gate: Gate) -> int:
        return len(self._spent[gate])

    def capacity(self, gate: Gate) -> Credit:
        return self._capacity[gate]
