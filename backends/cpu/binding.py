"""Binding of CPU kernels: the weights and options that they are bound to, the context that they
get in each step, and kernels that have a native form.
"""

import ctypes
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch

from sagellm.backends.cpu.native.library import NativeKernels
from sagellm.backends.interface import LoweringError, Weights
from sagellm.backends.quantised_weight import QuantisedWeight
from sagellm.backends.step import KVLayout, StepInputs
from sagellm.graphs.ir import SINK, Graph
from sagellm.graphs.kernels.token_mixers import PagedAttention, Rope

_STORED = (torch.float32, torch.bfloat16, torch.float16)  # float8 and integers would need scales


class Binding:
    """The weights and options that kernels are bound to when a program is made.

    Each weight is read once and converted to the program's dtype. Nodes that name the same weight
    share it. `native`: the C kernels; None if there is no C compiler or they must not be used.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Weights,
        layout: KVLayout,
        dtype: torch.dtype,
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
        self._num_users = Counter(node.attrs.get("weight") for node in graph.nodes)
        self._shared: dict[str, torch.Tensor] = {}
        self._looked_at: dict[str, torch.Tensor] = {}
        heads = [graph.node(edge.source) for edge in graph.inputs(SINK) if edge.inlet == "logits"]
        self._heads = {node.attrs.get("weight") for node in heads}

    @property
    def uses_tiles(self) -> bool:
        """Whether kernels may use tiles, with which a row's bits depend on the number of rows."""
        return self.native is not None and not self.deterministic and self.native.has_tiles

    def weight(self, name: str, *shape: int) -> torch.Tensor:
        """The weight `name`, contiguous, in the program's dtype.

        Raises LoweringError if the weight is absent, has another shape than `shape`, or is stored
        quantised.
        """
        if name in self._shared:
            return self._shared[name]
        found = self._found(name, shape)
        if isinstance(found, QuantisedWeight):
            raise LoweringError(f"weight {name!r} is quantised; only weights of linears may be")
        if found.dtype not in _STORED:
            stored = str(found.dtype).removeprefix("torch.")
            raise LoweringError(
                f"weight {name!r} is stored as {stored}; quantised weights are read as GPTQ and "
                f"AWQ store them; give the weights in bfloat16 or float32"
            )
        found = found.to(self.dtype).contiguous()
        # A weight of a single kernel is not kept: it can be freed once the kernel has packed it.
        if self._num_users[name] > 1:
            self._shared[name] = found
        return found

    def joined(self, names: Sequence[str], sizes: Sequence[int], size: int) -> torch.Tensor:
        """The weights `names`, each [N, size], concatenated along N. `sizes`: the N of each weight.

        Weights that are adjacent in memory, as they often are in a file, are not copied. Raises
        LoweringError as `weight` does.
        """
        parts = [self.weight(name, rows, size) for name, rows in zip(names, sizes, strict=True)]
        ends = itertools.pairwise(parts)
        if all(part.data_ptr() + part.nbytes == after.data_ptr() for part, after in ends):
            return _spanning(parts)
        return torch.cat(parts)

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

    def _found(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | QuantisedWeight:
        if name not in self._weights:
            raise LoweringError(f"the model folder has no weight {name!r} that its graph needs")
        looked_at = self._looked_at.pop(name, None)
        found = self._weights[name] if looked_at is None else looked_at
        if tuple(found.shape) != shape:
            raise LoweringError(
                f"weight {name!r} is {list(found.shape)}; config.json says {list(shape)}"
            )
        return found

    def vector(self, name: str, size: int) -> torch.Tensor:
        """The weight `name` of a norm, or a bias: [size] float32."""
        return self.weight(name, size).float()

    def makes_logits(self, name: str) -> bool:
        """Whether the layer with this weight computes the logits."""
        return name in self._heads


def _spanning(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor over the memory of adjacent contiguous tensors. The tensor keeps `parts` alive."""
    num_bytes = sum(part.nbytes for part in parts)
    memory: Any = (ctypes.c_char * num_bytes).from_address(parts[0].data_ptr())
    memory.kept = list(parts)  # the tensor below keeps `memory` alive
    whole = torch.frombuffer(memory, dtype=parts[0].dtype)
    return whole.view(-1, *parts[0].shape[1:])


T = TypeVar("T")


class ForwardContext:
    """The inputs and the pool of one step, and the values that all layers share (`once`).

    A context lives for one `run` of a program.
    """

    def __init__(self, inputs: StepInputs, pool: torch.Tensor) -> None:
        self.inputs = inputs
        self.pool = pool
        self._kept: dict[object, object] = {}

    def once(self, key: object, make: Callable[[], T]) -> T:
        """Call `make()` on the first call with `key`, and return the same value on later calls."""
        if key not in self._kept:
            self._kept[key] = make()
        return cast(T, self._kept[key])

    @property
    def row_sequences(self) -> torch.Tensor:
        """The index of each row's sequence: [T] int64."""
        return self.once("row_sequences", self._row_sequences)

    def _row_sequences(self) -> torch.Tensor:
        starts = self.inputs.query_starts
        return torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())

    def tables(self, table: int) -> torch.Tensor:
        """The block tables number `table`, one per sequence: [B, M] int32."""
        count = len(self.inputs.context_lens)
        return self.inputs.block_tables[table * count : (table + 1) * count]

    def slots(self, table: int) -> torch.Tensor:
        """The slot of each row's key and value in the blocks of table number `table`: [T] int64."""
        count = len(self.inputs.token_ids)
        return self.inputs.slots[table * count : (table + 1) * count]

    @property
    def longest_context(self) -> int:
        """The number of tokens of the longest sequence; every position of the step is smaller."""
        return max(self.inputs.contexts)


@dataclass(frozen=True, slots=True)
class NativeKernel:
    """A kernel that runs on tensors when called, and that a native step can run as well.

    `fields`: values for its NativeInstruction. `widths`: the width of each result; if empty, every
    result is as wide as the first inlet. `keep`: the owner of the memory that `fields` point to.
    """

    run: Callable[..., tuple[torch.Tensor, ...]]
    fields: Mapping[str, int | float | None] = field(default_factory=dict)
    widths: tuple[int, ...] = ()
    keep: object = None
    rope: Rope | None = None
    attention: PagedAttention | None = None

    def __call__(self, step: ForwardContext, *inlets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.run(step, *inlets)
