"""The memory that a kernel graph needs: weights, KV groups, and blocks of a pool."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from sagellm.graphs.ir import Graph, Value
from sagellm.graphs.kernels.dialect import KERNELS
from sagellm.graphs.kernels.token_mixers import LinearAttention, PagedAttention

Shape = tuple[int, ...]


def weight_shapes(graph: Graph) -> dict[str, Shape]:
    """Shape by tensor name, of an unfused kernel graph, in the order of its nodes."""
    found: dict[str, Shape] = {}
    for node in graph.nodes:
        found |= _READS.get(node.op, _no_weights)(node.attrs)
    return found


def linear_weights(graph: Graph) -> frozenset[str]:
    """The weights of the graph's linears: those that a folder may store quantised."""
    return frozenset(str(node.attrs["weight"]) for node in graph.nodes if node.op == "linear")


def _no_weights(options: Mapping[str, Value]) -> dict[str, Shape]:
    return {}


def _linear(options: Mapping[str, Value]) -> dict[str, Shape]:
    size, width = _whole(options["out_features"]), _whole(options["in_features"])
    bias = options.get("bias")
    biases = {bias: (size,)} if isinstance(bias, str) else {}
    return {str(options["weight"]): (size, width), **biases}


def _embedding(options: Mapping[str, Value]) -> dict[str, Shape]:
    shape = _whole(options["vocab_size"]), _whole(options["size"])
    return {str(options["weight"]): shape}


def _norm(options: Mapping[str, Value]) -> dict[str, Shape]:
    return {str(options["weight"]): (_whole(options["size"]),)}


def _whole(value: Value) -> int:
    assert isinstance(value, int)
    return value


_READS: dict[str, Callable[[Mapping[str, Value]], dict[str, Shape]]] = {
    "embedding": _embedding,
    "linear": _linear,
    "rms_norm": _norm,
}


GroupKind: TypeAlias = Literal["full", "window", "state"]
_ORDER: tuple[GroupKind, ...] = ("full", "window", "state")


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that remember alike.

    `full`: the keys and values of all tokens. `window`: those of the last `window` tokens. `state`:
    a recurrent state of `state_bytes` a layer, whatever the length of the sequence.
    """

    kind: GroupKind
    layers: tuple[int, ...]
    window: int | None = None
    state_bytes: int = 0

    def __str__(self) -> str:
        sizes = {"full": "", "window": f" of {self.window}", "state": f" of {self.state_bytes} B"}
        return f"{self.kind}{sizes[self.kind]}: layers {', '.join(map(str, self.layers))}"


def kv_groups(graph: Graph) -> tuple[KVGroup, ...]:
    """The groups of a kernel graph, fused or not: full attention first, states last.

    A layer whose keys and values several kernels read is kept for the one that sees farthest.
    """
    found: dict[int, KVGroup] = {}
    for node in graph.nodes:
        if node.op in ("paged_attention", "linear_attention"):
            one = _group(KERNELS[node.op].options(node))
            (layer,) = one.layers
            found[layer] = max(found.get(layer, one), one, key=_window_len)
    return _merged(found)


def _group(options: PagedAttention | LinearAttention) -> KVGroup:
    layers = (options.layer,)
    if isinstance(options, LinearAttention):
        return KVGroup("state", layers, state_bytes=options.state_bytes)
    return KVGroup("window" if options.window else "full", layers, options.window)


def _window_len(group: KVGroup) -> float:
    return float("inf") if group.window is None else group.window


def _merged(by_layer: dict[int, KVGroup]) -> tuple[KVGroup, ...]:
    layers: dict[KVGroup, list[int]] = {}
    for layer, one in sorted(by_layer.items()):
        layers.setdefault(KVGroup(one.kind, (), one.window, one.state_bytes), []).append(layer)
    groups = [
        KVGroup(alike.kind, tuple(numbers), alike.window, alike.state_bytes)
        for alike, numbers in layers.items()
    ]
    return tuple(sorted(groups, key=_rank))


def _rank(group: KVGroup) -> tuple[int, int, int]:
    return _ORDER.index(group.kind), group.window or 0, group.state_bytes


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
