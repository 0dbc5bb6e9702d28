"""Cases of packed weights of float and bfloat16: products, their gated form, the packing."""

from collections.abc import Iterator, Sequence

import numpy as np
from native_kernels.calls import Calls, Results
from native_kernels.cases import (
    KINDS,
    Array,
    Case,
    bfloat,
    close,
    packed_linear,
    random,
    rounded,
    silu,
    widened,
)

SHAPES = [(1, 8), (7, 77), (16, 1), (33, 2061), (150, 30), (64, 513)]
ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 25, 49]


def cases() -> Iterator[Case]:
    for kind in KINDS:
        for num_cols, k in SHAPES:
            yield product(kind, num_cols, k, ROWS, bias=k % 2 == 0)
        yield product(kind, 36, 40, [300, 403], bias=True)  # threads share rows
        yield product(kind, 70, 4 * 2048 + 3, [40], bias=True)  # k in several spans
        yield gated(kind, 96, 2061)
        yield not_numbers(kind)
        yield looked_up(kind)
        yield tuned(kind)
    yield shapes_of_gates()
    yield tuning_is_checked()


def tile_cases() -> Iterator[Case]:
    """Cases of the paths that have tiles. Vectors multiply fewer than four rows."""
    for num_cols, k in [(1, 8), (33, 77), (64, 513)]:
        yield product("tiles", num_cols, k, [4, 5, 16, 17, 32, 33, 49], bias=k % 2 == 0)
    yield product("tiles", 40, 70, [300, 520], bias=True)  # threads share rows
    yield product("tiles", 33, 4 * 2048 + 3, [70], bias=True)  # k in several chunks
    yield gated("tiles", 96, 600, counts=(4, 13, 48, 290))
    yield not_numbers("tiles")


def operands(kind: str, rows: int, num_cols: int, k: int) -> tuple[Array, Array, Array]:
    """Rows, the weight as it is stored, and the product in float64."""
    x, weight = random(rows, k), random(num_cols, k, seed=4)
    if kind == "float":
        return x, weight, x.astype(np.float64) @ weight.T.astype(np.float64)
    seen = rounded(x) if kind in ("pairs", "tiles") else x
    stored = bfloat(weight)
    return x, stored, seen.astype(np.float64) @ widened(stored).T.astype(np.float64)


def product(kind: str, num_cols: int, k: int, counts: list[int], *, bias: bool) -> Case:
    """Products of some numbers of rows, on other threads each. Rows of x and out are strided."""
    calls, ldx, ldo = Calls(f"{kind} {num_cols} x {k}"), k + 3, num_cols + 2
    most = max(counts)
    x, weight, wanted = operands(kind, most, num_cols, k)
    offset = random(num_cols, seed=5) if bias else None
    linear = packed_linear(calls, weight, offset, kind)
    wide = np.full((most, ldx), np.nan, np.float32)
    wide[:, 2 : 2 + k] = x
    rows = calls.array(wide)
    outs = []
    for index, count in enumerate([*counts, counts[-1]]):
        out = calls.array(np.full((count + 1, ldo), 7.0, np.float32), is_kept=True)
        threads = (1, 2, 3, 5)[index % 4]
        calls.call("sage_linear", linear, rows.at(8), ldx, out.at(4), ldo, count, threads)
        outs.append((count, out))

    def check(results: Results) -> None:
        whole = results[outs[-1][1]][:most, 1 : 1 + num_cols]
        close(whole, wanted if offset is None else wanted + offset, 2e-4 * max(1, k / 2061), 1e-5)
        for count, out in outs:
            found = results[out]
            assert (found[:count, 1 : 1 + num_cols] == whole[:count]).all()
            assert (found[:, [0, -1]] == 7.0).all()
            assert (found[count:] == 7.0).all()

    return Case(calls, check)


def gated(kind: str, half: int, k: int, counts: Sequence[int] = (1, 2, 5, 13, 48, 49, 260)) -> Case:
    """The gated form beside the product and silu_mul: the same bits."""
    calls = Calls(f"gated {kind}")
    x, weight, wanted = operands(kind, max(counts), 2 * half, k)
    offset = random(2 * half, seed=5)
    linear = packed_linear(calls, weight, offset, kind, gated=True)
    rows = calls.array(x)
    both = calls.array(np.zeros((max(counts), 2 * half), np.float32))
    separate = calls.array(np.zeros((max(counts), half), np.float32), is_kept=True)
    calls.call("sage_linear", linear, rows, k, both, 2 * half, max(counts), 2)
    calls.call(
        "sage_silu_mul",
        *(both, 2 * half, both.at(4 * half), 2 * half, separate, max(counts), half, 2),
    )
    outs = []
    for index, count in enumerate(counts):
        out = calls.array(np.zeros((count, half + 1), np.float32), is_kept=True)
        calls.call("gated", linear, rows, k, out, half + 1, count, 1 + index % 4)
        outs.append((count, out))

    def check(results: Results) -> None:
        gate, up = np.split(wanted + offset, 2, axis=1)
        close(results[separate], silu(gate) * up, atol=2e-2, rtol=1e-4)
        for count, out in outs:
            assert (results[out][:, :half] == results[separate][:count]).all()
            assert (results[out][:, half] == 0.0).all()

    return Case(calls, check)


def looked_up(kind: str) -> Case:
    """Single rows of packed weights have the bits that were packed."""
    calls, checks = Calls(f"rows of {kind}"), []
    for num_cols, k in SHAPES:
        _, weight, _ = operands(kind, 1, num_cols, k)
        linear = packed_linear(calls, weight, None, kind)
        out = calls.array(np.full((num_cols + 1, k), 7.0, np.float32), is_kept=True)
        for row in range(num_cols):
            calls.call("row", linear, row, out.at(4 * k * row))
        checks.append((weight if kind == "float" else widened(weight), out))

    def check(results: Results) -> None:
        for wanted, out in checks:
            assert (results[out][:-1] == wanted).all()
            assert (results[out][-1] == 7.0).all()

    return Case(calls, check)


def not_numbers(kind: str) -> Case:
    """NaN and infinity reach their own row and column alone."""
    calls, rows, num_cols, k = Calls(f"{kind} with NaN"), 9, 20, 40
    x, weight, _ = operands(kind, rows, num_cols, k)
    x[4, 3] = np.nan
    weight[6, 5] = np.inf if kind == "float" else 0x7F80
    linear = packed_linear(calls, weight, None, kind)
    out = calls.array(np.zeros((rows, num_cols), np.float32), is_kept=True)
    calls.call("sage_linear", linear, calls.array(x), k, out, num_cols, rows, 1)

    def check(results: Results) -> None:
        spared = np.ones((rows, num_cols), bool)
        spared[4], spared[:, 6] = False, False
        assert (np.isfinite(results[out]) == spared).all()

    return Case(calls, check)


def shapes_of_gates() -> Case:
    """Which shapes have a gated form: two halves of whole panels that are not too deep."""
    calls = Calls("is_gated")
    for shape in [(128, 64), (190, 64), (128, 1 << 20)]:
        calls.call("sage_is_gated", *shape)

    def check(results: Results) -> None:
        assert results.returned == [1, 0, 0]

    return Case(calls, check)


DEFAULT = (48, 1, 4096, 4096)
VALUES = [(1, 1, 512, 512), (48, 4, 4096, 4096), (64, 2, 8192, 1024)]
WRONG = [(0, 4, 512, 512), (65, 4, 512, 512), (1, 3, 512, 512), (1, 4, 500, 512), (1, 4, 512, 0)]


def tuned(kind: str) -> Case:
    """The values of tuning.h change no bit of a product."""
    calls, k, num_cols, counts = Calls(f"tuned {kind}"), 700, 150, (1, 3, 49)
    x, weight, _ = operands(kind, max(counts), num_cols, k)
    linear, rows, outs = packed_linear(calls, weight, None, kind), calls.array(x), []
    for values in (DEFAULT, *VALUES):
        calls.call("sage_tune_set", calls.array(np.array(values)))
        for count in counts:
            out = calls.array(np.zeros((count, num_cols), np.float32), is_kept=True)
            calls.call("sage_linear", linear, rows, k, out, num_cols, count, 2)
            outs.append(out)
    calls.call("sage_tune_set", calls.array(np.array(DEFAULT)))

    def check(results: Results) -> None:
        for index, out in enumerate(outs):
            assert (results[out] == results[outs[index % len(counts)]]).all()

    return Case(calls, check)


def tuning_is_checked() -> Case:
    """Usable values are taken; values out of range change nothing."""
    calls, outs = Calls("tuning"), []
    for values in (*VALUES, *WRONG, DEFAULT):
        now, initial = (calls.array(np.zeros(4, np.int64), is_kept=True) for _ in range(2))
        calls.call("sage_tune_set", calls.array(np.array(values)))
        calls.call("sage_tune_get", now, initial)
        outs.append((now, initial))

    def check(results: Results) -> None:
        assert results.returned[::2] == [0] * len(VALUES) + [1] * len(WRONG) + [0]
        wanted = [*VALUES, *VALUES[-1:] * len(WRONG), DEFAULT]
        for (now, initial), values in zip(outs, wanted, strict=True):
            assert tuple(results[now]) == values
            assert tuple(results[initial]) == DEFAULT

    return Case(calls, check)
