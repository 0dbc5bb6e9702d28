"""Binding of CPU kernels: the weights and options that they are bound to, and kernels in native
form.
"""

import ctypes
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sagellm.backends.arrays import BFLOAT16, Array, Floats, dtype_name, to_bfloat16, to_float32
from sagellm.backends.cpu.linear import PackedLinear, PackingQueue, WeightsInFiles
from sagellm.backends.cpu.native.library import NativeKernels
from sagellm.backends.cpu.native.tuning import default_threads
from sagellm.backends.interface import LoweringError, Weights
from sagellm.backends.quantised_weight import QuantisedWeight
from sagellm.backends.step import KVLayout
from sagellm.graphs.ir import SINK, Graph
from sagellm.graphs.kernels.token_mixers import PagedAttention, Rope

# float8 and integers would need scales
_STORED = ("float32", "bfloat16", "float16")


class Binding:
    """The weights and options that kernels are bound to when a program is made.

    Each weight is read once and converted to the program's dtype. Nodes that name the same weight
    share it, or its packed form. `native`: the C kernels; None if there is no C compiler or they
    must not be used. `queue`: weights that the C kernels need packed. Its `run` must come before
    any kernel.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Weights,
        layout: KVLayout,
        dtype: np.dtype[Any],
        native: NativeKernels | None,
        deterministic: bool,
        quantization: str | None = None,
    ) -> None:
        self.layout = layout
        self.dtype = dtype
        self.native = native
        self.deterministic = deterministic
        self.quantization = quantization
        self._weights = weights
        self._files = weights if isinstance(weights, WeightsInFiles) else None
        self._num_users = Counter(node.attrs.get("weight") for node in graph.nodes)
        self._shared: dict[str, Array] = {}
        self._looked_at: dict[str, Array] = {}
        self._packed: dict[str, PackedLinear] = {}
        self.queue: PackingQueue | None = None
        if native is not None:
            self.queue = PackingQueue(native, default_threads(native.tuning.tuned), self._files)
        heads = [graph.node(edge.source) for edge in graph.inputs(SINK) if edge.inlet == "logits"]
        self._heads = {node.attrs.get("weight") for node in heads}

    @property
    def uses_tiles(self) -> bool:
        """Whether kernels may use tiles, with which a row's bits depend on the number of rows."""
        return self.native is not None and not self.deterministic and self.native.has_tiles

    def weight(self, name: str, *shape: int) -> Array:
        """The weight `name`, contiguous, in the program's dtype.

        Raises LoweringError if the weight is absent, has another shape than `shape`, or is stored
        quantised.
        """
        if name in self._shared:
            return self._shared[name]
        found = self._found(name, shape)
        if isinstance(found, QuantisedWeight):
            raise LoweringError(f"weight {name!r} is quantised; only weights of linears may be")
        stored = dtype_name(found.dtype)
        if stored not in _STORED:
            raise LoweringError(
                f"weight {name!r} is stored as {stored}; quantised weights are read as GPTQ and "
                f"AWQ store them; give the weights in bfloat16 or float32"
            )
        convert = to_bfloat16 if self.dtype == BFLOAT16 else to_float32
        found = np.ascontiguousarray(convert(found))
        # A weight of a single kernel is not kept: it can be freed once the kernel has packed it.
        if self._num_users[name] > 1:
            self._shared[name] = found
        return found

    def keep_packed(self, name: str, packed: "PackedLinear") -> None:
        """Keep the packed form of a weight that has more users, in place of the weight itself."""
        if self._num_users[name] > 1:
            self._packed[name] = packed
            self._shared.pop(name, None)

    def packed(self, name: str, *shape: int) -> "PackedLinear | None":
        """The packed form of the weight `name` of a linear that was bound before, if its shape is
        `shape`.
        """
        found = self._packed.get(name)
        return found if found is not None and found.shape == shape else None

    def joined(self, names: Sequence[str], sizes: Sequence[int], size: int) -> Array:
        """The weights `names`, each [N, size], concatenated along N. `sizes`: the N of each weight.

        Weights that are adjacent in memory, as they often are in a file, are not copied. Raises
        LoweringError as `weight` does.
        """
        parts = self.parts(names, sizes, size)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def parts(self, names: Sequence[str], sizes: Sequence[int], size: int) -> Sequence[Array]:
        """The weights of `joined`, not copied: one array if they are adjacent in memory. Raises
        LoweringError as `weight` does.
        """
        parts = [self.weight(name, rows, size) for name, rows in zip(names, sizes, strict=True)]
        ends = itertools.pairwise(parts)
        if all(part.ctypes.data + part.nbytes == after.ctypes.data for part, after in ends):
            return [_spanning(parts)]
        return parts

    def stored(self, name: str, *shape: int) -> QuantisedWeight | None:
        """The weight `name` if it is stored quantised, or None if it is stored in floats. Raises
        LoweringError if it is absent or has another shape than `shape`.
        """
        if name in self._shared:
            return None
        found = self._found(name, shape)
        if isinstance(found, QuantisedWeight):
            return found
        self._looked_at[name] = found  # the caller calls `weight` next, which must not read again
        return None

    def _found(self, name: str, shape: tuple[int, ...]) -> Array | QuantisedWeight:
        if name not in self._weights:
            raise LoweringError(f"the model folder has no weight {name!r} that its graph needs")
        looked_at = self._looked_at.pop(name, None)
        found = self._weights[name] if looked_at is None else looked_at
        if tuple(found.shape) != shape:
            raise LoweringError(
                f"weight {name!r} is {list(found.shape)}; config.json says {list(shape)}"
            )
        return found

    def vector(self, name: str, size: int) -> Floats:
        """The weight `name` of a norm, or a bias: [size] float32."""
        return to_float32(self.weight(name, size))

    def give_back(self) -> None:
        """Drop the pages of mapped files from memory; those that are used again are read again."""
        if self._files is not None:
            self._files.give_back()

    def makes_logits(self, name: str) -> bool:
        """Whether the layer with this weight computes the logits."""
        return name in self._heads


def _spanning(parts: Sequence[Array]) -> Array:
    """One array over the memory of adjacent contiguous arrays. The array keeps `parts` alive."""
    num_bytes = sum(part.nbytes for part in parts)
    memory: Any = (ctypes.c_char * num_bytes).from_address(parts[0].ctypes.data)
    memory.kept = list(parts)  # the array below keeps `memory` alive
    return np.frombuffer(memory, dtype=parts[0].dtype).reshape(-1, *parts[0].shape[1:])


@dataclass(frozen=True, slots=True)
class NativeKernel:
    """A kernel as the native step runs it.

    `fields`: values for its NativeInstruction. `widths`: the width of each result; if empty, every
    result is as wide as the first inlet. `keep`: the owner of the memory that `fields` point to.
    """

    fields: Mapping[str, int | float | None] = field(default_factory=dict)
    widths: tuple[int, ...] = ()
    keep: object = None
    rope: Rope | None = None
    attention: PagedAttention | None = None
