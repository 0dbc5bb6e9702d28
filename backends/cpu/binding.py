"""What a kernel is bound to when a program is made: weights, dtype, pool layout, native code."""

from collections import Counter
from collections.abc import Mapping

import torch

from sagellm.backends.cpu.native.library import NativeKernels
from sagellm.backends.protocol import LoweringError
from sagellm.backends.step import KVLayout
from sagellm.graphs.ir import SINK, Graph

_STORED = (torch.float32, torch.bfloat16, torch.float16)  # float8 and whole numbers need scales


class Binding:
    """Hands out weights in the program's dtype, each read once.

    `native` is None without a C compiler. A weight that several nodes name is shared.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, torch.Tensor],
        layout: KVLayout,
        dtype: torch.dtype,
        native: NativeKernels | None,
        deterministic: bool,
    ) -> None:
        self.layout = layout
        self.dtype = dtype
        self.native = native
        self.deterministic = deterministic
        self._weights = weights
        self._num_users = Counter(node.attrs.get("weight") for node in graph.nodes)
        self._shared: dict[str, torch.Tensor] = {}
        heads = [graph.node(edge.source) for edge in graph.inputs(SINK) if edge.inlet == "logits"]
        self._heads = {node.attrs.get("weight") for node in heads}

    def weight(self, name: str, *shape: int) -> torch.Tensor:
        """A weight of that shape, contiguous. Raises LoweringError if it is absent or another.

        So it does for a weight that is stored quantised.
        """
        if name in self._shared:
            return self._shared[name]
        if name not in self._weights:
            raise LoweringError(f"the model folder has no weight {name!r} that its graph needs")
        found = self._weights[name]
        if found.dtype not in _STORED:
            stored = str(found.dtype).removeprefix("torch.")
            raise LoweringError(
                f"weight {name!r} is stored as {stored}; quantised weights are not built; "
                f"give the weights in bfloat16 or float32"
            )
        if tuple(found.shape) != shape:
            raise LoweringError(
                f"weight {name!r} is {list(found.shape)}; config.json says {list(shape)}"
            )
        found = found.to(self.dtype).contiguous()
        if self._num_users[name] > 1:
            self._shared[name] = found
        return found

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A weight of one dimension, in float32: norms and biases."""
        return self.weight(name, size).float()

    def makes_logits(self, name: str) -> bool:
        """Whether rows times this weight are the logits."""
        return name in self._heads
