"""A lease on KV blocks: its life cycle as a transition table, and the record that obeys it."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from sagellm.runtime.kv.prefix_tree import PrefixNode
from sagellm.runtime.messages import LeaseRef
from sagellm.runtime.port import StaleLease

LeaseState: TypeAlias = Literal["reserved", "receiving", "filled", "sending", "released"]
LeaseEvent: TypeAlias = Literal[
    "fill", "receive", "arrive", "send", "acknowledge",
    "finish", "preempt", "cancel", "expire", "refuse", "crash",
]  # fmt: skip
LeaseOwner: TypeAlias = Literal["sequence", "transfer"]

FREED = -1  # in a block table: behind a window, and given back

LIVE: tuple[LeaseState, ...] = ("reserved", "receiving", "filled", "sending")
FAULTS: tuple[LeaseEvent, ...] = ("cancel", "expire", "refuse", "crash")

TRANSITIONS: dict[tuple[LeaseState, LeaseEvent], LeaseState] = {
    ("reserved", "fill"): "filled",  # this engine computed the keys and values
    ("reserved", "receive"): "receiving",  # another pool began to send them
    ("receiving", "arrive"): "filled",
    ("filled", "send"): "sending",
    ("sending", "acknowledge"): "released",
    ("reserved", "finish"): "released",
    ("filled", "finish"): "released",
    ("reserved", "preempt"): "released",
    ("filled", "preempt"): "released",
    # Whatever goes wrong ends a live lease at once: copies run chunk by chunk on the same thread,
    # and check both leases before each chunk, so that nobody still writes the blocks.
    **{(state, fault): "released" for state in LIVE for fault in FAULTS},
    # A second fault finds nothing left to do: cancel, time-out and crash may cross.
    **{("released", fault): "released" for fault in FAULTS},
}


@dataclass(frozen=True, slots=True)
class Fence:
    """Whose lease it is: a request that re-enters raises the epoch and voids the older ones."""

    request_id: str
    choice: int
    epoch: int


@dataclass(slots=True, eq=False)
class Lease:
    """References to blocks of one pool, with exactly one owner. Only its pool changes it.

    `tables`: the block tables of all KV groups, as LeaseShape counts them, by position; what lies
    behind a window is `FREED`. `num_tokens` is the length it was asked for; `path` what is
    published of its leading blocks: other sequences may refer to those, and nobody writes them any
    more.

    `snapshot`: the blocks of recurrent state that steps write; `kept`: (number of tokens, blocks)
    of states that are not to be written any more: the step that begins there reads them.
    """

    lease_id: int
    fence: Fence
    owner: LeaseOwner
    tables: list[list[int]]
    num_tokens: int
    capacity: int  # tokens that the blocks can hold
    path: list[PrefixNode] = field(default_factory=list)
    state: LeaseState = "reserved"
    snapshot: list[int] = field(default_factory=list)
    kept: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def blocks(self) -> list[int]:
        """Every block that it refers to."""
        held = [block for table in self.tables for block in table if block != FREED]
        return held + self.snapshot + [block for _, kept in self.kept for block in kept]

    def state_at(self, position: int) -> list[int]:
        """Where a step that begins at `position` finds the state of the tokens before it."""
        if position == 0:
            return []
        if self.kept and self.kept[-1][0] == position:
            return self.kept[-1][1]
        return self.snapshot

    def next_state(self, event: LeaseEvent) -> LeaseState:
        """The state after `event`. Raises StaleLease where the table has no such transition."""
        try:
            return TRANSITIONS[self.state, event]
        except KeyError:
            raise StaleLease(f"lease {self.lease_id} is {self.state}: it cannot {event}") from None

    def require(self, *states: LeaseState) -> None:
        """Raises StaleLease unless the lease is in one of `states`."""
        if self.state not in states:
            wanted = " or ".join(states)
            raise StaleLease(f"lease {self.lease_id} is {self.state}, not {wanted}")

    def ref(self, engine: str, replica: int) -> LeaseRef:
        """The name by which the world outside the pool knows it."""
        return LeaseRef(
            engine=engine,
            replica=replica,
            lease_id=self.lease_id,
            request_id=self.fence.request_id,
            choice=self.fence.choice,
            epoch=self.fence.epoch,
            num_tokens=self.num_tokens,
        )
