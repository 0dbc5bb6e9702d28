"""What logic operators have taken and not sent on: the choices that end if one of them fails."""

from collections.abc import Container

from sagellm.runtime.messages import Item

_Choices = dict[int, Item]


class Holdings:
    """The latest item of each open choice that stays at each operator: `held`, by operator,
    request and choice.

    `entries` has the ids of all open requests: items that come after the end of their request are
    not kept.
    """

    def __init__(self, nodes: tuple[str, ...], entries: Container[str]) -> None:
        self._entries = entries
        self.held: dict[str, dict[str, _Choices]] = {node: {} for node in nodes}

    def take(self, node: str, item: Item) -> None:
        if item.request_id in self._entries:
            self.held[node].setdefault(item.request_id, {})[item.choice] = item

    def send(self, node: str, item: Item) -> None:
        """An operator sent an item of this choice."""
        held = self.held.get(node, {})  # a port or a service operator holds nothing here
        if item.request_id in held:
            self._drop(held, item.request_id, item.choice)

    def forget(self, request_id: str, choice: int | None = None) -> None:
        """A choice has ended; None: all of them."""
        for held in self.held.values():
            if choice is None:
                held.pop(request_id, None)
            elif request_id in held:
                self._drop(held, request_id, choice)

    def of(self, node: str) -> tuple[Item, ...]:
        """In the order in which their requests came."""
        return tuple(item for choices in self.held[node].values() for item in choices.values())

    @staticmethod
    def _drop(held: dict[str, _Choices], request_id: str, choice: int) -> None:
        choices = held[request_id]
        choices.pop(choice, None)
        if not choices:
            del held[request_id]
