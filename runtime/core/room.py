"""Room: whether any engine that requests of an operator enter next may take one."""

from sagellm.runtime.core.credit import Gates
from sagellm.runtime.core.ways import entrances
from sagellm.runtime.feedback import RoomChanged
from sagellm.runtime.plan import Plan


class Room:
    """What the operators that subscribe to "room" were told."""

    def __init__(self, plan: Plan, gates: Gates) -> None:
        self._gates = gates
        self._entrances = {
            name: frozenset(entrances(plan.graph, plan.logic, name))
            for name in plan.logic
            if "room" in plan.spec(name).subscribes
        }
        self._full: set[str] = set()  # operators that were told so
        self._full_services: set[str] = set()  # as they were at the last call of `changes`

    @property
    def may_have_changed(self) -> bool:
        """Whether other service operators are full than at the last call of `changes`."""
        return self._gates.full != self._full_services

    def changes(self) -> list[RoomChanged]:
        """What has changed since the last call; several changes that cancel out are none."""
        self._full_services = set(self._gates.full)
        found = []
        for node, names in self._entrances.items():
            is_full = all(map(self._has_no_room, names))
            if is_full != (node in self._full):
                (self._full.add if is_full else self._full.remove)(node)
                found.append(RoomChanged(node=node, has_room=not is_full))
        return found

    def _has_no_room(self, node: str) -> bool:
        """Whether no replica of an operator, or of the one that decodes for it, has room."""
        gates = self._gates
        return node in gates.full or gates.reserved.later.get(node) in gates.full
