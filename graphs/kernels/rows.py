"""Kernels that pick rows: `embedding` and `select_rows`."""

from collections.abc import Mapping
from dataclasses import dataclass

from sagellm.graphs.ir import TensorType
from sagellm.graphs.kernels.kernel import ShapeError, kernel
from sagellm.graphs.vocabulary import NoOptions


@dataclass(frozen=True, slots=True)
class Embedding:
    """`weight` [vocab_size, size], as stored; `dtype` is that of the result."""

    weight: str
    vocab_size: int
    size: int
    dtype: str


def _embedding(options: Embedding, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    ids = inlets["in"]
    if ids.dtype != "int64" or len(ids.shape) != 1:
        raise ShapeError(f"in is {ids}; token ids are int64 [T]")
    return {"out": TensorType((*ids.shape, options.size), options.dtype)}


def _select_rows(_: NoOptions, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    rows, chosen = inlets["in"], inlets["rows"]
    if chosen.dtype != "int64" or len(chosen.shape) != 1:
        raise ShapeError(f"rows is {chosen}; row numbers are int64 [R]")
    return {"out": TensorType((*chosen.shape, *rows.shape[1:]), rows.dtype)}


EMBEDDING = kernel("embedding", "in", "out", Embedding, _embedding)
SELECT_ROWS = kernel("select_rows", "in rows", "out", NoOptions, _select_rows)
