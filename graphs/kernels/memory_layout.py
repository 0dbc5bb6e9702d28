"""The memory that a kernel graph needs: weights, KV groups, and blocks of a KV pool."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

from sagellm.graphs.ir import Graph, Value
from sagellm.graphs.kernels.dialect import KERNELS
from sagellm.graphs.kernels.token_mixers import LinearAttention, PagedAttention

Shape: TypeAlias = tuple[int, ...]
GroupKind: TypeAlias = Literal["full", "window", "state"]
_ORDER: tuple[GroupKind, ...] = ("full", "window", "state")
# Bytes of a number, by dtype.
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
SCALE_BYTES = 2  # of the bfloat16 scale that each key and value in 8 bits has
_WASTE_SHARE = 8  # empty layers in blocks may be at most 1/8 of the model's layers


def weight_shapes(graph: Graph) -> dict[str, Shape]:
    """The shapes of the weights by tensor name, in the order of the nodes.

    The graph must be unfused: fused kernels name several weights.
    """
    found: dict[str, Shape] = {}
    for node in graph.nodes:
        found |= _SHAPES_OF.get(node.op, _no_weights)(node.attrs)
    return found


def linear_weights(graph: Graph) -> frozenset[str]:
    """The names of the weights of linear layers, which a model folder may store quantised."""
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


def _layer_norm(options: Mapping[str, Value]) -> dict[str, Shape]:
    shape = (_whole(options["size"]),)
    return {str(options["weight"]): shape, str(options["bias"]): shape}


def _whole(value: Value) -> int:
    assert isinstance(value, int)
    return value


_SHAPES_OF: dict[str, Callable[[Mapping[str, Value]], dict[str, Shape]]] = {
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "rms_norm": _norm,
}


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that keep the same kind of memory between steps.

    Kind "full": keys and values of all tokens. "window": keys and values of the last `window`
    tokens. "state": a recurrent state of `state_bytes` bytes per layer, for a sequence of any
    length.
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

    If several kernels read the keys and values of one layer, the widest window counts.
    """
    found: dict[int, KVGroup] = {}
    for node in graph.nodes:
        if node.op in ("paged_attention", "linear_attention"):
            group = _group(KERNELS[node.op].options(node))
            (layer,) = group.layers
            found[layer] = max(found.get(layer, group), group, key=_window_len)
    return _merged(found)


def _group(options: PagedAttention | LinearAttention) -> KVGroup:
    layers = (options.layer,)
    if isinstance(options, LinearAttention):
        return KVGroup("state", layers, state_bytes=options.state_bytes)
    return KVGroup("window" if options.window else "full", layers, options.window)


def _window_len(group: KVGroup) -> float:
    # Full attention counts as the widest window: it needs all keys and values.
    return float("inf") if group.window is None else group.window


def _merged(by_layer: dict[int, KVGroup]) -> tuple[KVGroup, ...]:
    layers: dict[KVGroup, list[int]] = {}
    for layer, group in sorted(by_layer.items()):
        layers.setdefault(replace(group, layers=()), []).append(layer)
    groups = [replace(group, layers=tuple(numbers)) for group, numbers in layers.items()]
    return tuple(sorted(groups, key=_rank))


def _rank(group: KVGroup) -> tuple[int, int, int]:
    return _ORDER.index(group.kind), group.window or 0, group.state_bytes


@dataclass(frozen=True)
class KVBlocks:
    """The layout of all groups in one pool of equal blocks, after vLLM's hybrid KV cache manager.

    A block holds the keys and values of `block_size` tokens in `block_layers` layers, or parts of
    the states of `block_layers` layers. A group with more layers has several block tables, and uses
    one block of each table for the same tokens. Because all blocks are equal, one group can use the
    blocks that another group frees, and a transfer moves blocks without knowing their content.
    `itemsize`: bytes of a number in a key or value. `scale_bytes`: bytes of the scale of each key
    and value, 0 if they have none.
    """

    groups: tuple[KVGroup, ...]
    num_kv_heads: int
    head_dim: int
    block_size: int
    itemsize: int
    scale_bytes: int = 0

    @cached_property
    def block_layers(self) -> int:
        """The number of layers in a block: the largest number with few empty layers in blocks.

        A block has empty layers if a group's number of layers is not a multiple of this number. All
        empty layers together may be at most 1 / _WASTE_SHARE of the groups' layers.
        """
        counts = [len(group.layers) for group in self.groups]
        total = sum(counts)
        # Wide blocks are better: a sequence needs fewer block tables.
        for width in range(min(counts), 1, -1):
            if sum(-(-count // width) * width for count in counts) <= total + total // _WASTE_SHARE:
                return width
        return 1

    @property
    def layer_bytes(self) -> int:
        """The bytes of one layer in a block: its keys and values."""
        row_bytes = self.head_dim * self.itemsize + self.scale_bytes
        return 2 * self.num_kv_heads * self.block_size * row_bytes

    @property
    def block_bytes(self) -> int:
        return self.block_layers * self.layer_bytes

    @property
    def token_groups(self) -> tuple[KVGroup, ...]:
        """The groups that keep keys and values of tokens."""
        return tuple(group for group in self.groups if group.kind != "state")

    def num_tables(self, group: KVGroup) -> int:
        return -(-len(group.layers) // self.block_layers)

    @property
    def num_state_blocks(self) -> int:
        """The number of blocks of one snapshot, which is the states of all layers of a sequence."""
        return sum(map(self._snapshot_blocks, self.groups))

    def row(self, layer: int) -> int:
        """The index, within a block, of the layer `layer` of the model."""
        return self._index(layer)[1] % self.block_layers

    def table(self, layer: int) -> int:
        """The number of an attention layer's block table. Tables are numbered group by group."""
        group, index = self._index(layer)
        tables = [self.num_tables(other) for other in self.token_groups]
        return sum(tables[: self.groups.index(group)]) + index // self.block_layers

    def state_blocks(self, layer: int) -> range:
        """The indices of the blocks of a snapshot that together hold the state of a layer."""
        group, index = self._index(layer)
        before = self.groups[: self.groups.index(group)]
        count = self._layer_blocks(group)
        first = sum(map(self._snapshot_blocks, before)) + index // self.block_layers * count
        return range(first, first + count)

    def _index(self, layer: int) -> tuple[KVGroup, int]:
        for group in self.groups:
            if layer in group.layers:
                return group, group.layers.index(layer)
        raise KeyError(f"layer {layer} keeps nothing between steps")

    def _layer_blocks(self, group: KVGroup) -> int:
        """The number of blocks that together hold the state of one layer."""
        return -(-group.state_bytes // self.layer_bytes)

    def _snapshot_blocks(self, group: KVGroup) -> int:
        return self.num_tables(group) * self._layer_blocks(group)
