"""Where each layer's memory lies in the blocks of a pool: `place_layers`."""

from dataclasses import dataclass, replace

from sagellm.graphs.ir import Graph, Node
from sagellm.graphs.kernels.kv_blocks import KVBlocks

_TOKENS = ("kv_write", "rope_kv_write", "paged_attention")


@dataclass(frozen=True, slots=True)
class PlaceLayers:
    """Writes into each kernel with memory the layer of its blocks, and which blocks those are.

    Before it `layer` counts the layers of the model, and there is one block table.
    """

    blocks: KVBlocks
    name: str = "place_layers"

    def apply(self, graph: Graph) -> Graph:
        return replace(graph, nodes=tuple(map(self._placed, graph.nodes)))

    def _placed(self, node: Node) -> Node:
        layer = node.attrs.get("layer")
        if not isinstance(layer, int):
            return node
        row = self.blocks.row(layer)
        if node.op in _TOKENS:
            table = self.blocks.table(layer)
            return node.with_attrs(layer=row, **({"table": table} if table else {}))
        parts = self.blocks.state_blocks(layer)
        return node.with_attrs(layer=row, first_block=parts.start, num_blocks=len(parts))
