"""KV groups: what a model remembers between steps, as its kernel graph says."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from sagellm.graphs.ir import Graph
from sagellm.graphs.kernels.attention import PagedAttention
from sagellm.graphs.kernels.linear_attention import LinearAttention
from sagellm.graphs.kernels.vocabulary import KERNELS

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
            found[layer] = max(found.get(layer, one), one, key=_sight)
    return _merged(found)


def _group(options: PagedAttention | LinearAttention) -> KVGroup:
    layers = (options.layer,)
    if isinstance(options, LinearAttention):
        return KVGroup("state", layers, state_bytes=options.state_bytes)
    return KVGroup("window" if options.window else "full", layers, options.window)


def _sight(group: KVGroup) -> float:
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
