"""CPU kernels: what a kernel is bound to, what it is called with, and its native form."""

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

_STORED = (torch.float32, torch.bfloat16, torch.float16)  # float8 and whole numbers need scales


class Binding:
    """Hands out weights in the program's dtype, each read once.

    `native` is None without a C compiler. A weight that several nodes name is shared.
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

    def weight(self, name: str, *shape: int) -> torch.Tensor:
        """A weight of that shape, contiguous. Raises LoweringError if it is absent or another.

        So it does for a weight that is stored quantised.
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
        if self._num_users[name] > 1:
            self._shared[name] = found
        return found

    def joined(self, names: Sequence[str], sizes: Sequence[int], size: int) -> torch.Tensor:
        """Weights [N, K] one behind the other, N as `sizes` say: [sum of sizes, K].

        No copy is made of those that lie so in the file. Raises as `weight` does.
        """
        parts = [self.weight(name, rows, size) for name, rows in zip(names, sizes, strict=True)]
        ends = itertools.pairwise(parts)
        if all(part.data_ptr() + part.nbytes == after.data_ptr() for part, after in ends):
            return _spanning(parts)
        return torch.cat(parts)

    def stored(self, name: str, *shape: int) -> QuantisedWeight | None:
        """A weight that is stored quantised, of that shape; None if it is in floats."""
        if name in self._shared:
            return None
        found = self._found(name, shape)
        if isinstance(found, QuantisedWeight):
            return found
        self._looked_at[name] = found  # `weight` comes next, and is not to read it again
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
        """A weight of one dimension, in float32: norms and biases."""
        return self.weight(name, size).float()

    def makes_logits(self, name: str) -> bool:
        """Whether rows times this weight are the logits."""
        return name in self._heads


def _spanning(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The memory of contiguous tensors that touch, as one tensor, which keeps them."""
    num_bytes = sum(part.nbytes for part in parts)
    memory: Any = (ctypes.c_char * num_bytes).from_address(parts[0].data_ptr())
    memory.kept = list(parts)
    whole = torch.frombuffer(memory, dtype=parts[0].dtype)
    return whole.view(-1, *parts[0].shape[1:])


T = TypeVar("T")


class ForwardContext:
    """Lives for one `run`. `once` keeps what is the same in every layer."""

    def __init__(self, inputs: StepInputs, pool: torch.Tensor) -> None:
        self.inputs = inputs
        self.pool = pool
        self._kept: dict[object, object] = {}

    def once(self, key: object, make: Callable[[], T]) -> T:
        """`make()` the first time `key` is asked for, the same value afterwards."""
        if key not in self._kept:
            self._kept[key] = make()
        return cast(T, self._kept[key])

    @property
    def row_sequences(self) -> torch.Tensor:
        """[T] int64: the sequence of each row."""
        return self.once("row_sequences", self._row_sequences)

    def _row_sequences(self) -> torch.Tensor:
        starts = self.inputs.query_starts
        return torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())

    def tables(self, table: int) -> torch.Tensor:
        """[B, M] int32: the block tables of that number, one a sequence."""
        count = len(self.inputs.context_lens)
        return self.inputs.block_tables[table * count : (table + 1) * count]

    def slots(self, table: int) -> torch.Tensor:
        """[T] int64: where each row's key and value go in the blocks of that table."""
        count = len(self.inputs.token_ids)
        return self.inputs.slots[table * count : (table + 1) * count]

    @property
    def all_rows(self) -> torch.Tensor:
        """[T] int64: 0, 1, 2, ..."""
        return self.once("all_rows", lambda: torch.arange(len(self.inputs.token_ids)))

    @property
    def longest_context(self) -> int:
        """Tokens; every position of the step is below it."""
        return max(self.inputs.contexts)


@dataclass(frozen=True, slots=True)
class NativeKernel:
    """Called, it runs on tensors. `fields` are those of its Instruction.

    `widths` are those of its results; by default there is one, as wide as the first inlet. `keep`
    is what pointers among the fields point to.
    """

    run: Callable[..., tuple[torch.Tensor, ...]]
    fields: Mapping[str, int | float | None] = field(default_factory=dict)
    widths: tuple[int, ...] = ()
    keep: object = None
    rope: Rope | None = None
    attention: PagedAttention | None = None

    def __call__(self, step: ForwardContext, *inlets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.run(step, *inlets)
