"""Decode steps with keys and values in 8 and in 16 bits: `python -m benchmarks.kv_cache`.

`python -m benchmarks.kv_cache qwen05-2-layers` measures two layers only. One program reads both
pools in turns. The pools hold random numbers, so that no prompt has to be computed.
"""

import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.shape import QWEN05, QWEN05_2L, Shape
from benchmarks.weights import model_folder
from sagellm.backends import KVLayout, StepInputs
from sagellm.backends.arrays import Array
from sagellm.backends.cpu import CpuBackend
from sagellm.backends.cpu.attention import quantised
from sagellm.backends.cpu.torch_linear import array, tensor
from sagellm.graphs.models import build, facts
from sagellm.runtime.models.folder import resolve_model
from sagellm.runtime.models.stored_weights import open_weights

CELLS = ((1, 2048), (1, 8192), (1, 32000), (8, 8192))  # sequences, and tokens of each
SHAPES = {shape.name: shape for shape in (QWEN05, QWEN05_2L)}
_DTYPES = ("bfloat16", "int8")
_BLOCK_SIZE = 16
_GIB = 2**30


def measured(shape: Shape, rounds: int, threads: int) -> list[str]:
    """The median step of each cell, as a table in Markdown."""
    folder = resolve_model(str(model_folder(shape)))
    model, device = facts(folder.config), CpuBackend().device()
    heads = model.num_layers, model.num_kv_heads, model.head_dim
    layouts = {dtype: KVLayout(*heads, _BLOCK_SIZE, dtype) for dtype in _DTYPES}
    program: Any = device.lower(
        build(folder.config),
        open_weights(folder),
        layout=layouts["bfloat16"],
        dtype="bfloat16",
        deterministic=False,
    )
    num_blocks = max(count * context for count, context in CELLS) // _BLOCK_SIZE
    pools = {dtype: _filled(device, layouts[dtype], num_blocks) for dtype in _DTYPES}
    lines = ["| sequences | context | bfloat16, ms | int8, ms | speed |", "|---|---|---|---|---|"]
    for count, context in CELLS:
        inputs = _inputs(count, context)
        times = _times(program, inputs, pools, rounds, threads)
        wide, small = (median(times[dtype]) for dtype in _DTYPES)
        lines.append(f"| {count} | {context} | {wide:.2f} | {small:.2f} | {wide / small:.2f}x |")
    for dtype, layout in layouts.items():
        token_bytes = layout.block_bytes // _BLOCK_SIZE
        lines.append(f"{dtype}: {token_bytes} bytes a token, {_GIB // token_bytes} tokens a GiB")
    return lines


def _filled(device: Any, layout: KVLayout, num_blocks: int) -> Array:
    """A pool of random numbers, the same in each layer."""
    pool = tensor(device.allocate(layout, num_blocks).pool)
    sizes = num_blocks, layout.num_kv_heads, layout.block_size, layout.head_dim
    side = torch.randn(sizes)
    pool[:, :] = quantised(side) if pool.dtype == torch.int8 else side.to(pool.dtype)
    return array(pool)


def _inputs(count: int, context: int) -> StepInputs:
    """A step with one new token of each sequence. The blocks of a sequence are consecutive."""
    per_sequence = context // _BLOCK_SIZE
    tables = np.arange(count * per_sequence, dtype=np.int32).reshape(count, per_sequence)
    return StepInputs(
        token_ids=np.arange(count),
        positions=np.full(count, context - 1),
        slots=tables[:, -1].astype(np.int64) * _BLOCK_SIZE + (context - 1) % _BLOCK_SIZE,
        query_starts=np.arange(count + 1),
        context_lens=np.full(count, context),
        block_tables=tables,
        logit_rows=np.arange(count),
        states=np.empty((2, count, 0), dtype=np.int32),
        query_lens=(1,) * count,
        contexts=(context,) * count,
    )


def _times(
    program: Any, inputs: StepInputs, pools: dict[str, Array], rounds: int, threads: int
) -> dict[str, Sequence[float]]:
    """Milliseconds of each step; the pools take turns, and the first round does not count."""
    times: dict[str, list[float]] = {dtype: [] for dtype in pools}
    for _ in range(rounds + 1):
        for dtype, pool in pools.items():
            started = time.perf_counter()
            program.run(inputs, pool, threads)
            times[dtype].append(1e3 * (time.perf_counter() - started))
    return {dtype: found[1:] for dtype, found in times.items()}


if __name__ == "__main__":
    shape = SHAPES[sys.argv[1]] if len(sys.argv) > 1 else QWEN05
    print("\n".join(measured(shape, rounds=15, threads=2)))
