"""The structures that Python fills and C reads. Each mirrors a struct of a C header, field by
field; a test compares their sizes (`sage_sizes`).
"""

import ctypes
from typing import Any, ClassVar

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int32, ctypes.c_float


class NativeHeads(ctypes.Structure):
    """attention.h: the heads of a layer. `window` 0: all earlier tokens."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, _LONG) for name in ("heads", "kv_heads", "head_dim", "window")),
        ("scale", _FLOAT),
    ]


class NativeBatch(ctypes.Structure):
    """attention.h: the sequences of a step, with their first rows and their context lengths."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, _LONG) for name in ("table_len", "num_sequences", "block_size")),
        ("query_starts", _POINTER),
        ("context_lens", _POINTER),
        ("dtype", _INT),
        ("tiles", _INT),
    ]


class NativeLayer(ctypes.Structure):
    """attention.h: the queries, the keys and values, and the result of one layer."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, _POINTER) for name in ("q", "keys", "values", "out")),
        *((name, _LONG) for name in ("ldq", "ldo")),
        ("tables", _POINTER),
    ]


class NativeLinear(ctypes.Structure):
    """linear.h: a kernel, and a weight in the order that the kernel reads."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, _POINTER) for name in ("run", "gated", "row")),
        *((name, _POINTER) for name in ("weight", "scales", "zeros", "bias")),
        *((name, _LONG) for name in ("num_cols", "k", "group")),
    ]


class NativePacking(ctypes.Structure):
    """pack.h: a weight to be packed, in memory or in a file."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, _POINTER) for name in ("weight", "packed")),
        *((name, _LONG) for name in ("num_cols", "k", "offset")),
        *((name, _INT) for name in ("kind", "fd")),
    ]


class NativeView(ctypes.Structure):
    """step.h: a matrix in the arena. A negative `first` stands for the tensor of the logits."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        (name, _LONG) for name in ("first", "column", "width")
    ]


class NativeInstruction(ctypes.Structure):
    """step.h: a kernel with its weight, and the matrices that it reads and fills."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, _INT) for name in ("op", "waits", "chosen", "table_form")),
        ("inlets", NativeView * 3),
        ("outlets", NativeView * 2),
        ("weight", _POINTER),
        *((name, _LONG) for name in ("width", "size", "layer", "table", "blocks")),
        ("epsilon", _FLOAT),
    ]


class NativeStep(ctypes.Structure):
    """step.h: a program, the inputs of one step, and memory that C keeps between steps."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, _POINTER) for name in ("instructions", "heads", "tables")),
        *((name, _LONG) for name in ("num_instructions", "num_heads")),
        ("batch", NativeBatch),
        *((name, _POINTER) for name in ("token_ids", "positions", "slots", "logit_rows", "pool")),
        ("block_tables", _POINTER),
        *((name, _LONG) for name in ("layer_bytes", "side_bytes", "kv_heads", "head_dim")),
        *((name, _LONG) for name in ("num_rows", "num_logit_rows")),
        *((name, _POINTER) for name in ("arena", "logits", "largest")),
        ("capacity", _LONG),
        ("times", _POINTER),
        ("memory", _POINTER),
        ("memory_bytes", _LONG),
    ]


SIZED = (
    NativeStep,
    NativeInstruction,
    NativeLinear,
    NativeHeads,
    NativeBatch,
    NativeLayer,
    NativePacking,
)  # in the order of sage_sizes
