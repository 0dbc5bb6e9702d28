"""Cases of quantised weights: products by rows of integers and of bfloat16, and their making."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from native_kernels.calls import Blob, Calls, Results
from native_kernels.cases import Array, Case, bfloat, random, rounded, widened

from sagellm.backends.cpu.quantised_linear import TRIES, NativeQuant
from sagellm.backends.quantised_weight import LEVELS

FORMS = [(8, 16), (8, 8), (4, 16), (4, 8), (8, 0), (4, 0)]  # 0: rows of bfloat16
BLOCK, COLS = 32, 16
TOP = {8: 127.0, 16: 32639.0}


def cases() -> Iterator[Case]:
    for bits, row_bits in FORMS:
        for num_cols, k, group in [(1, 32, 32), (7, 77, 32), (33, 2061, 64), (48, 1024, 128)]:
            for extra in ("", "zeros", "levels")[: 3 if bits == 4 else 2]:
                yield product(bits, row_bits, num_cols, k, group, extra=extra)
        yield product(bits, row_bits, 40, 96, 32, counts=[130, 300])  # threads share rows
        yield product(bits, row_bits, 40, 8300, 32, counts=[70])  # k in several parts
        yield gated(bits, f"{row_bits or 'pairs'}", 96)
        yield gated(bits, f"{row_bits or 'pairs'}", 1100)  # k in two parts
        if row_bits:
            yield largest(bits, row_bits)
            yield tiny(bits, row_bits)
    for bits, row_bits in [(8, 16), (8, 8), (4, 8)]:
        yield chosen(bits, row_bits)
        yield gated(bits, f"{row_bits}_many", 96)
    yield shapes_of_gates()
    for bits in (4, 8):
        for is_bfloat in (0, 1):
            yield making(bits, is_bfloat)
        yield making_of_extremes(bits)


def rounded_rows(x: Array, row_bits: int) -> Array:
    """Rows as the kernels see them: rounded to bfloat16, or with a scale for each block."""
    if not row_bits:
        return rounded(x).astype(np.float64)
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK))).reshape(len(x), -1, BLOCK)
    most = np.abs(padded).max(-1, keepdims=True)
    top = np.float32(TOP[row_bits])
    by = np.where(most > 1e-30, top / np.where(most > 0, most, 1), 0.0).astype(np.float32)
    codes = np.rint(padded * by)
    seen: Array = (codes * (most / top)).reshape(len(x), -1)[:, : x.shape[1]]
    return seen.astype(np.float64)


def packed_codes(codes: Array, bits: int) -> Array:
    """The codes [N, K] as quant.c reads them: [panel, k / 4, 16, 4], or two of 4 bits a byte."""
    fill = 8 if bits == 4 else 0
    around = ((0, -codes.shape[0] % (2 * COLS)), (0, -codes.shape[1] % BLOCK))
    filled = np.pad(codes, around, constant_values=fill)
    panels = filled.reshape(-1, COLS, filled.shape[1] // 4, 4).swapaxes(1, 2)
    return panels if bits == 8 else panels[:, 0::2] | panels[:, 1::2] << 4


def packed_groups(of_groups: Array) -> Array:
    """Scales or zeros [N, G] as quant.c reads them: [panel, G, 16]."""
    filled = np.pad(of_groups, ((0, -len(of_groups) % (2 * COLS)), (0, 0)))
    return filled.reshape(-1, COLS, filled.shape[1]).swapaxes(1, 2)


def linear(
    calls: Calls,
    codes: Array,
    scales: Array,
    forms: tuple[int, int, int],
    run: str = "",
    **extra: Any,
) -> Blob:
    """A Quant. `forms`: bits of the weight and of rows, and the group. `run`: another kernel."""
    bits, row_bits, group = forms
    num_cols, k = codes.shape
    return calls.struct(
        NativeQuant,
        run=run or f"sage_quant_{bits}_{row_bits or 'pairs'}",
        weight=calls.array(packed_codes(codes, bits)),
        scales=calls.array(packed_groups(scales)),
        num_cols=num_cols,
        k=k,
        group=group,
        **extra,
    )


def random_codes(bits: int, num_cols: int, k: int) -> Array:
    numbers = np.random.default_rng([bits, num_cols, k])
    if bits == 4:
        return numbers.integers(0, 16, (num_cols, k), np.uint8)
    return numbers.integers(-127, 128, (num_cols, k), np.int8)


def product(*form: int, counts: list[int] | None = None, extra: str = "") -> Case:
    """Products of some rows. `extra`: "zeros" (with an order of k, without bias) or "levels"."""
    bits, row_bits, num_cols, k, group = form
    calls = Calls(f"{bits} x {row_bits} bits, {num_cols} x {k}, {extra}")
    counts = counts or [1, 2, 3, 4, 5, 6, 7, 12, 67]
    groups, numbers = -(-k // group), np.random.default_rng(6)
    codes = random_codes(bits, num_cols, k)
    scales = (numbers.random((num_cols, groups)) / 100 + 1e-3).astype(np.float16)
    scales[0, 0] = 1e-7  # below float16's normal range
    zeros = np.full((num_cols, groups), 8 if bits == 4 else 0, np.int16)
    order, bias = np.arange(k), random(num_cols)
    optional: dict[str, Any] = {"bias": calls.array(bias)}
    if extra == "zeros":
        low, high = (0, 16) if bits == 4 else (-127, 128)
        zeros = numbers.integers(low, high, (num_cols, groups), np.int16)
        order, bias = numbers.permutation(k), np.zeros(num_cols, np.float32)
        optional = {
            "zeros": calls.array(packed_groups(zeros)),
            "order": calls.array(order.astype(np.int32)),
        }
    x = random(max(counts), k)
    each = np.arange(k) // group
    values = codes.astype(np.float64) - zeros[:, each]
    if extra == "levels":
        values = np.array(LEVELS, np.float64)[codes]
        optional["levels"] = calls.array(np.array(LEVELS, np.int8))
    wide = values * scales.astype(np.float64)[:, each]
    if not row_bits:
        wide = rounded(wide.astype(np.float32)).astype(np.float64)
    made = linear(calls, codes, scales, (bits, row_bits, group), **optional)
    rows, outs = calls.array(x), []
    for index, count in enumerate(counts):
        out = calls.array(np.full((count, num_cols + 1), 7.0, np.float32), is_kept=True)
        threads = (1, 2, 3, 7)[index % 4]
        calls.call("sage_linear", made, rows, k, out, num_cols + 1, count, threads)
        outs.append((count, out))
    wanted = rounded_rows(x[:, order], row_bits) @ wide.T + bias

    def check(results: Results) -> None:
        whole = results[outs[-1][1]]
        relative(whole[:, :num_cols], wanted, 1e-5)
        for count, out in outs:
            assert (results[out] == whole[:count]).all()
        assert (whole[:, num_cols] == 7.0).all()

    return Case(calls, check)


def relative(found: Array, wanted: Array, most: float) -> None:
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error < most, error


def largest(bits: int, row_bits: int) -> Case:
    """The largest codes and rows do not overflow."""
    calls, outs = Calls(f"{bits} x {row_bits} bits, the largest"), []
    x = np.stack([np.ones(64), -np.ones(64), 1e6 * np.ones(64)]).astype(np.float32)
    for code in (0, 15) if bits == 4 else (-127, 127):
        codes = np.full((16, 64), code, np.uint8 if bits == 4 else np.int8)
        scales = np.full((16, 2), [6e4, -3e-5]).astype(np.float16)
        out = calls.array(np.zeros((3, 16), np.float32), is_kept=True)
        made = linear(calls, codes, scales, (bits, row_bits, 32))
        calls.call("sage_linear", made, calls.array(x), 64, out, 16, 3, 1)
        wide = (codes.astype(np.float64) - (8 if bits == 4 else 0)) * scales.repeat(32, 1)
        outs.append((out, x.astype(np.float64) @ wide.T))

    def check(results: Results) -> None:
        for out, wanted in outs:
            relative(results[out], wanted, 1e-6)

    return Case(calls, check)


def tiny(bits: int, row_bits: int) -> Case:
    """Rows of zeros, and of numbers whose inverse is none."""
    calls = Calls(f"{bits} x {row_bits} bits, tiny")
    x = random(3, 96) * np.array([[0.0], [1e-38], [1e-20]], np.float32)
    codes, scales = random_codes(bits, 5, 96), np.full((5, 3), 0.01, np.float16)
    out = calls.array(np.full((3, 5), 7.0, np.float32), is_kept=True)
    made = linear(calls, codes, scales, (bits, row_bits, 32))
    calls.call("sage_linear", made, calls.array(x), 96, out, 5, 3, 1)

    def check(results: Results) -> None:
        assert np.abs(results[out][:2]).max() < 1e-30
        assert 0.0 < np.abs(results[out][2]).max() < 1e-17

    return Case(calls, check)


def chosen(bits: int, row_bits: int) -> Case:
    """The kernel that chooses by the number of rows: the bits of integers, or of bfloat16."""
    calls, k, num_cols = Calls(f"{bits} x {row_bits} bits or bfloat16"), 96, 33
    codes, scales = random_codes(bits, num_cols, k), np.full((num_cols, 3), 0.01, np.float16)
    forms, outs = (bits, row_bits, 32), []
    rows = calls.array(random(64, k))
    for count in (15, 16, 63, 64):
        for run in (f"{row_bits}_many", f"{row_bits}", "pairs"):
            out = calls.array(np.zeros((count, num_cols), np.float32), is_kept=True)
            made = linear(calls, codes, scales, forms, f"sage_quant_{bits}_{run}")
            calls.call("sage_linear", made, rows, k, out, num_cols, count, 2)
            outs.append(out)
    features = [calls.call("sage_has_tiles"), calls.call("sage_has_pairs")]
    features.append(calls.call("sage_packed_bytes", 1, 1, 0))

    def check(results: Results) -> None:
        has_tiles, has_pairs, panel_bytes = (results.returned[call] for call in features)
        least = 1000
        if has_tiles:
            least = 16
        elif has_pairs and panel_bytes == 128 and row_bits == 16:  # of AVX512
            least = 64
        for index, count in enumerate((15, 16, 63, 64)):
            found, integers, pairs = (results[out] for out in outs[3 * index : 3 * index + 3])
            assert (found == (pairs if count >= least else integers)).all()
            assert (integers != pairs).any()

    return Case(calls, check)


def gated(bits: int, form: str, k: int, half: int = 64) -> Case:
    """The gated form beside the product and silu_mul: the same bits."""
    calls, counts = Calls(f"gated, {bits} x {form}, {k}"), [1, 2, 25, 130, 300]
    codes, scales = random_codes(bits, 2 * half, k), np.full((2 * half, -(-k // BLOCK)), 0.01)
    run = f"sage_quant_{bits}_{form}"
    made = linear(
        calls, codes, scales.astype(np.float16), (bits, 0, BLOCK), run, gated=f"{run}_gated"
    )
    rows, outs = calls.array(random(max(counts), k)), []
    for index, count in enumerate(counts):
        both = calls.array(np.zeros((count, 2 * half), np.float32))
        separate, joint = (
            calls.array(np.zeros((count, width), np.float32), is_kept=True)
            for width in (half, half + 1)
        )
        calls.call("sage_linear", made, rows, k, both, 2 * half, count, 2)
        calls.call(
            "sage_silu_mul",
            *(both, 2 * half, both.at(4 * half), 2 * half, separate, count, half, 2),
        )
        calls.call("gated", made, rows, k, joint, half + 1, count, 1 + index % 3)
        outs.append((separate, joint))

    def check(results: Results) -> None:
        for separate, joint in outs:
            assert (results[joint][:, :half] == results[separate]).all()
            assert (results[joint][:, half] == 0.0).all()
            assert results[separate].any()

    return Case(calls, check)


def shapes_of_gates() -> Case:
    """Which shapes have a gated form: two halves of whole panels that are not too deep."""
    calls = Calls("is_quant_gated")
    for shape in [(128, 64), (160, 64), (128, 4096)]:
        calls.call("sage_is_quant_gated", *shape)

    def check(results: Results) -> None:
        assert results.returned == [1, 0, 0]

    return Case(calls, check)


def make(calls: Calls, weight: Array, bits: int, is_bfloat: int) -> tuple[Blob, Blob]:
    """Call sage_quant_make. Returns codes and scales."""
    num_rows, k = weight.shape
    tries = np.array(TRIES[bits], np.float32)
    codes = calls.array(np.zeros((num_rows, k), np.uint8 if bits == 4 else np.int8), is_kept=True)
    scales = calls.array(np.zeros((num_rows, -(-k // BLOCK)), np.float16), is_kept=True)
    calls.call(
        "sage_quant_make",
        *(calls.array(weight), is_bfloat, calls.array(tries), len(tries)),
        calls.array(np.array(LEVELS, np.float32)),
        *(codes, scales, bits, num_rows, k, 2),
    )
    return codes, scales


def values_of(codes: Array, scales: Array, bits: int) -> Array:
    """The numbers that made codes stand for."""
    numbers = np.array(LEVELS)[codes] if bits == 4 else codes
    wide: Array = scales.astype(np.float64).repeat(BLOCK, 1)[:, : codes.shape[1]]
    return numbers * wide


def plain_values(groups: Array, bits: int) -> Array:
    """The plain formulas at the same size: of 8 bits, Q8_0; of 4 bits, IQ4_NL."""
    at = np.abs(groups).argmax(-1, keepdims=True)
    most = np.take_along_axis(groups, at, -1)
    scales = (most / -127 if bits == 4 else np.abs(most) / 127).astype(np.float16)
    scales = scales.astype(np.float64)
    numbers = np.array(LEVELS if bits == 4 else range(-127, 128))
    nearest = np.searchsorted((numbers[1:] + numbers[:-1]) / 2, groups / scales)
    values: Array = numbers[nearest] * scales
    return values


def making(bits: int, is_bfloat: int) -> Case:
    """Quantising a weight: each group at least as good as by the plain formula."""
    calls, k = Calls(f"{bits} bits are made, bfloat {is_bfloat}"), 77
    weight = random(9, k) * np.float32(0.02)
    stored = bfloat(weight) if is_bfloat else weight
    right = widened(stored) if is_bfloat else weight
    codes, scales = make(calls, stored, bits, is_bfloat)

    def check(results: Results) -> None:
        found = values_of(results[codes], results[scales], bits)
        groups, ours = (
            np.pad(one, ((0, 0), (0, -k % BLOCK))).reshape(9, -1, BLOCK)
            for one in (right, found - right)
        )
        theirs = plain_values(groups, bits) - groups
        errors = [(error**2).sum(-1) for error in (ours, theirs)]
        assert (errors[0] <= errors[1] * 1.0001 + 1e-12).all()
        assert errors[0].sum() < 0.985 * errors[1].sum()

    return Case(calls, check)


def making_of_extremes(bits: int) -> Case:
    """Zeros, and numbers whose scale float16 lacks."""
    calls, weight = Calls(f"{bits} bits of extremes"), np.zeros((3, 64), np.float32)
    weight[1, :32], weight[2] = 1e-12, np.linspace(-1e7, 1e7, 64)
    codes, scales = make(calls, weight, bits, 0)

    def check(results: Results) -> None:
        assert np.isfinite(results[scales].astype(np.float64)).all()
        assert not values_of(results[codes], results[scales], bits)[:2].any()

    return Case(calls, check)
