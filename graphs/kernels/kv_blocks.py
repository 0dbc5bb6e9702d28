"""How the KV groups of a model lie in the blocks of one pool."""

from dataclasses import dataclass
from functools import cached_property

from sagellm.graphs.kernels.kv_groups import KVGroup

_MOST_WASTE = 8  # of that many layers in the pool's blocks, one may be empty


@dataclass(frozen=True)
class KVBlocks:
    """All groups share one pool of equal blocks, after vLLM's hybrid KV cache manager.

    A block holds `block_layers` layers of `block_size` tokens, or a part of their states. A group
    with more layers takes several blocks for the same tokens: one for each of its *tables*. So what
    one group frees, another can use, and a transfer moves blocks without knowing what is in them.
    `itemsize`: bytes of a number in a key or value.
    """

    groups: tuple[KVGroup, ...]
    num_kv_heads: int
    head_dim: int
    block_size: int
    itemsize: int

    @cached_property
    def block_layers(self) -> int:
        """The most layers a block at which next to none of them are empty."""
        counts = [len(group.layers) for group in self.groups]
        total = sum(counts)
        for width in range(min(counts), 1, -1):
            if sum(-(-count // width) * width for count in counts) <= total + total // _MOST_WASTE:
                return width
        return 1

    @property
    def layer_bytes(self) -> int:
        """Of one layer of a block: keys and values."""
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * self.itemsize

    @property
    def block_bytes(self) -> int:
        return self.block_layers * self.layer_bytes

    @property
    def token_groups(self) -> tuple[KVGroup, ...]:
        """The groups that keep something of each token."""
        return tuple(group for group in self.groups if group.kind != "state")

    def num_tables(self, group: KVGroup) -> int:
        return -(-len(group.layers) // self.block_layers)

    @property
    def num_state_blocks(self) -> int:
        """Of one snapshot: the states of all layers of one sequence."""
        return sum(map(self._snapshot_blocks, self.groups))

    def row(self, layer: int) -> int:
        """The layer of its blocks in which a layer of the model lies."""
        return self._index(layer)[1] % self.block_layers

    def table(self, layer: int) -> int:
        """The block table of a layer that attends. Tables are counted group by group."""
        group, index = self._index(layer)
        tables = [self.num_tables(other) for other in self.token_groups]
        return sum(tables[: self.groups.index(group)]) + index // self.block_layers

    def state_blocks(self, layer: int) -> range:
        """Which blocks of a snapshot hold the state of a layer, a part in each."""
        group, index = self._index(layer)
        before = self.groups[: self.groups.index(group)]
        count = self._parts(group)
        first = sum(map(self._snapshot_blocks, before)) + index // self.block_layers * count
        return range(first, first + count)

    def _index(self, layer: int) -> tuple[KVGroup, int]:
        for group in self.groups:
            if layer in group.layers:
                return group, group.layers.index(layer)
        raise KeyError(f"layer {layer} keeps nothing between steps")

    def _parts(self, group: KVGroup) -> int:
        """Blocks over which the state of one layer is spread."""
        return -(-group.state_bytes // self.layer_bytes)

    def _snapshot_blocks(self, group: KVGroup) -> int:
        return self.num_tables(group) * self._parts(group)
