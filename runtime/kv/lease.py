"""A lease on KV blocks: its life cycle as a transition table, its record, and its block tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from sagellm.runtime.kv.prefix_tree import GroupBlocks, PrefixNode
from sagellm.runtime.lease_shape import LeaseShape
from sagellm.runtime.messages import FinishReason, LeaseRef
from sagellm.runtime.port import StaleLease

LeaseState: TypeAlias = Literal["reserved", "receiving", "filled", "sending", "released"]
LeaseEvent: TypeAlias = Literal[
    "fill", "receive", "arrive", "send", "acknowledge",
    "finish", "preempt", "cancel", "expire", "refuse", "crash",
]  # fmt: skip
LeaseOwner: TypeAlias = Literal["sequence", "transfer"]

# The event of a sequence's lease when the sequence ends.
EVENT_AT_END: dict[FinishReason, LeaseEvent] = {
    "stop": "finish",
    "length": "finish",
    "cancelled": "cancel",
    "expired": "expire",
    "refused": "refuse",
    "failed": "crash",
}

FREED = -1  # in a block table: the block has left the window, and was freed

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
    # Any fault ends a live lease at once. Copies run chunk by chunk on the same thread, and check
    # both leases before each chunk, so no copy writes the blocks of a released lease.
    **{(state, fault): "released" for state in LIVE for fault in FAULTS},
    # A second fault is ignored: a cancel, a time-out and a crash may come together.
    **{("released", fault): "released" for fault in FAULTS},
}


@dataclass(frozen=True, slots=True)
class Fence:
    """Identifies the owner of a lease. A request that re-enters the graph gets a higher epoch, so
    older leases do not match it any more.
    """

    request_id: str
    choice: int
    epoch: int


@dataclass(slots=True, eq=False)
class Lease:
    """References to blocks of one pool, with exactly one owner. Only the pool changes a lease.

    `tables`: the block tables of all KV groups, in the order of LeaseShape. Each table has one
    block for every `block_size` tokens; a block that has left its window is `FREED`. `num_tokens`:
    the number of tokens that were reserved. `path`: the nodes of the published prefix. Other
    sequences may share the blocks of these nodes, and no step writes them again.

    `state_blocks`: the blocks of the recurrent state that steps overwrite. `snapshots`: frozen
    recurrent states, as (number of tokens, blocks). A step that begins at that number of tokens
    reads the snapshot; no step writes it.
    """

    lease_id: int
    fence: Fence
    owner: LeaseOwner
    tables: list[list[int]]
    num_tokens: int
    capacity: int  # tokens that the blocks can hold
    path: list[PrefixNode] = field(default_factory=list)
    state: LeaseState = "reserved"
    state_blocks: list[int] = field(default_factory=list)
    snapshots: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def blocks(self) -> list[int]:
        """Every block that the lease refers to."""
        held = [block for table in self.tables for block in table if block != FREED]
        frozen = [block for _, snapshot in self.snapshots for block in snapshot]
        return held + self.state_blocks + frozen

    def state_at(self, position: int) -> list[int]:
        """The blocks of the recurrent state from which a step at `position` begins."""
        if position == 0:
            return []
        if self.snapshots and self.snapshots[-1][0] == position:
            return self.snapshots[-1][1]
        return self.state_blocks

    def next_state(self, event: LeaseEvent) -> LeaseState:
        """The state after `event`. Raises StaleLease if the table has no such transition."""
        try:
            return TRANSITIONS[self.state, event]
        except KeyError:
            raise StaleLease(f"lease {self.lease_id} is {self.state}: it cannot {event}") from None

    def require(self, *states: LeaseState) -> None:
        """Raise StaleLease unless the lease is in one of `states`."""
        if self.state not in states:
            wanted = " or ".join(states)
            raise StaleLease(f"lease {self.lease_id} is {self.state}, not {wanted}")

    def ref(self, engine: str, replica: int) -> LeaseRef:
        """The reference by which other components name the lease."""
        return LeaseRef(
            engine=engine,
            replica=replica,
            lease_id=self.lease_id,
            request_id=self.fence.request_id,
            choice=self.fence.choice,
            epoch=self.fence.epoch,
            num_tokens=self.num_tokens,
        )


class TableLayout:
    """Maps the KV groups of a shape to the block tables of leases."""

    def __init__(self, shape: LeaseShape) -> None:
        self.shape = shape
        self.of_group = [  # the tables of each group, as a slice of `Lease.tables`
            slice(end - group.num_tables, end)
            for group, end in zip(shape.groups, shape.ends, strict=True)
        ]

    def num_reusable(self, path: Sequence[PrefixNode]) -> int:
        """The number of leading nodes of a live path that a sequence can reuse.

        Every group must still hold the blocks that later tokens read: full attention reads all
        blocks, a window the blocks inside it, and recurrent layers the state at exactly that
        position.
        """
        if not self.shape.forgets:
            return len(path)
        best, since = 0, [0] * len(self.shape.groups)  # a group holds all blocks from `since` on
        for count, node in enumerate(path, 1):
            for index in range(len(since)):
                if node.entries[index] is None:
                    since[index] = count
            position = count * self.shape.block_size
            firsts = (self.shape.first(group, position) for group in self.shape.groups)
            has_tokens = all(have <= first for have, first in zip(since, firsts, strict=True))
            if has_tokens and (not self.shape.num_state_blocks or node.entries[-1] is not None):
                best = count
        return best

    def sent(self, lease: Lease, first: int = 0) -> list[int]:
        """The blocks that another pool needs to continue after the lease's tokens.

        The order is the same in all pools of one shape. From tables of full attention, the blocks
        before block `first` are left out.
        """
        position, blocks = lease.num_tokens, []
        spans = self.shape.spans(position, position)
        for group, tables, (start, end) in zip(
            self.shape.groups, self.of_group, spans, strict=True
        ):
            start = first if group.window is None else start
            for table in lease.tables[tables]:
                blocks += table[start:end]
        return blocks + lease.state_at(position)

    def full_blocks(self, lease: Lease, first: int, end: int) -> list[int]:
        """Blocks `first` to `end`, exclusive, of the tables of full attention."""
        full = self.of_group[0] if self.shape.has_full else slice(0)
        return [block for table in lease.tables[full] for block in table[first:end]]

    def shares(
        self, num_tokens: int, prefix: Sequence[PrefixNode], start: int
    ) -> Iterator[tuple[int, int, list[GroupBlocks]]]:
        """Yield for each KV group its number of tables, the number of blocks in each table, and the
        entries of `prefix` that the group shares. The lease is for `num_tokens` tokens, and steps
        compute the tokens from `start` on.
        """
        spans = self.shape.spans(num_tokens, start)
        for index, (group, (first, end)) in enumerate(zip(self.shape.groups, spans, strict=True)):
            entries = (node.entries[index] for node in prefix[first:])
            yield group.num_tables, end - first, [entry for entry in entries if entry]

    def states(self, path: Sequence[PrefixNode]) -> list[GroupBlocks]:
        """The recurrent state at the end of a path, as a list; empty if the tree holds none."""
        entry = path[-1].entries[-1] if path and self.shape.num_state_blocks else None
        return [entry] if entry else []
