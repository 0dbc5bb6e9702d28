"""Milliseconds of the linears of Qwen2.5-0.5B: `python -m benchmarks.quantised_linear`.

Rows may be given (`... 1 512`). Set OMP_WAIT_POLICY=PASSIVE, as the Makefile does: the threads of
OpenMP otherwise spin on cores that the next variant needs.

The variants take turns in one run; the median of each counts. Up to 16 rows, there are more weights
than fit the cache, as in a model. With more rows, a weight is reused so often that the cache does
not matter.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.shape import QWEN05
from sagellm.backends.cpu.native.library import NativeKernels, native_kernels
from sagellm.backends.cpu.quantised_linear import PackedQuantised, quantise
from sagellm.backends.cpu.torch_linear import (
    LinearFunction,
    array,
    by_kernel,
    has_bfloat16_products,
    native,
    packed,
)
from sagellm.backends.quantised_weight import MODES

_HIDDEN, _INNER = QWEN05.hidden, QWEN05.intermediate
SHAPES = (
    *((_HIDDEN + 2 * QWEN05.kv_width, _HIDDEN), (_HIDDEN, _HIDDEN), (2 * _INNER, _HIDDEN)),
    *((_HIDDEN, _INNER), (QWEN05.vocab_size, _HIDDEN)),
)
NUM_ROWS = (1, 4, 16, 32, 512)
_CACHE_BYTES, _MOST_COPIES, _ROUNDS = 64 << 20, 160, 7


def variants(
    kernels: NativeKernels, weight: torch.Tensor
) -> dict[str, Callable[[], LinearFunction]]:
    """Functions that make a product with a copy of `weight`, by variant."""

    def of_mode(name: str) -> Callable[[], LinearFunction]:
        made = quantise(kernels, array(weight), MODES[name].weight_bits)

        def make() -> LinearFunction:
            return by_kernel(PackedQuantised(kernels, made, None, MODES[name].row_bits))

        return make

    def floats() -> LinearFunction:
        copy = weight.clone()
        return packed(copy, None) if has_bfloat16_products() else native(kernels, copy, None)

    return {"bf16": floats, **{name: of_mode(name) for name in MODES}}


def copies(kernels: NativeKernels, shape: tuple[int, int]) -> dict[str, list[LinearFunction]]:
    """Products by variant, with more weights together than fit the cache."""
    weight = torch.randn(shape).bfloat16()
    count = max(1, min(_MOST_COPIES, _CACHE_BYTES // (weight.numel() // 2)))
    return {
        name: [make() for _ in range(count)] for name, make in variants(kernels, weight).items()
    }


def measure(made: dict[str, list[LinearFunction]], rows: torch.Tensor) -> dict[str, float]:
    """Milliseconds of a product, by variant."""
    taken: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(3 if len(rows) > 32 else _ROUNDS):
        for name, products in made.items():
            products[-1](rows)  # wake the helper threads
            start = time.perf_counter()
            used = products if len(rows) <= 16 else products[:1]
            for product in used:
                product(rows)
            taken[name].append((time.perf_counter() - start) / len(used) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    kernels = native_kernels()
    if kernels is None:
        raise SystemExit("no C compiler, no kernels to measure; install gcc or clang")
    print("| N x K | rows |", " | ".join(f"{name}, ms" for name in ("bf16", *MODES)), "|")
    print("|---" * (3 + len(MODES)), end="|\n")
    for shape in SHAPES:
        made = copies(kernels, shape)
        for num_rows in [int(rows) for rows in sys.argv[1:]] or NUM_ROWS:
            if shape[0] == QWEN05.vocab_size and num_rows > 32:
                continue  # the output layer computes one row a sequence
            found = measure(made, torch.randn(num_rows, shape[1]))
            base = found["bf16"]
            cells = [f"{ms:.3f} ({base / ms:.2f}x)" for ms in found.values()]
            print(f"| {shape[0]} x {shape[1]} | {num_rows} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
