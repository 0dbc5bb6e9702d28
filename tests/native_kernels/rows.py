"""Cases of kernels that compute row by row, of the choice of tokens, and of the copy."""

from collections.abc import Iterator

import numpy as np
import xxhash
from native_kernels.calls import Blob, Calls, Results
from native_kernels.cases import Array, Case, bfloat, close, coded, decoded, random, silu

BITS = 32
FLOAT, BFLOAT, INT8 = range(3)  # the dtypes of codes.h


def cases() -> Iterator[Case]:
    for width, size in [(40, 40), (36, 12), (13, 13)]:
        yield norm(width, size)
    for num_rows, width in [(9, 8), (9, 21), (2, 4999)]:
        yield silu_mul(num_rows, width)
    for dtype in (FLOAT, BFLOAT, INT8):
        yield rope(dtype)
    yield codes_of_extremes()
    yield choice()
    yield largest_of_all()
    for num_rows, size in [(1, 1), (5, 37), (12, 3000)]:
        yield sampling(num_rows, size)
    yield sampling_without_memory()
    yield copy()


def norm(width: int, size: int) -> Case:
    """RMSNorm of a sum, and of the sum alone."""
    calls, a, b = Calls(f"norm {width} by {size}"), random(5, width), random(5, width, seed=4)
    weight, out = random(size), np.zeros((5, width), np.float32)
    total, found, again = (calls.array(out, is_kept=True) for _ in range(3))
    given = calls.array(weight)
    tail = (5, width, size, 1e-5, 2)
    pair = (calls.array(a), width, calls.array(b), width)
    calls.call("sage_rms_norm", *pair, given, total, found, *tail)
    calls.call("sage_rms_norm", total, width, None, 0, given, total, again, *tail)
    runs = (a + b).reshape(5, -1, size).astype(np.float64)
    wanted = runs / np.sqrt((runs**2).mean(-1, keepdims=True) + 1e-5) * weight

    def check(results: Results) -> None:
        assert (results[total] == a + b).all()
        close(results[found], wanted.reshape(5, width), atol=1e-5)
        assert (results[again] == results[found]).all()

    return Case(calls, check)


def silu_mul(num_rows: int, width: int) -> Case:
    """Gate and up as halves of one matrix; some numbers leave the range of exp."""
    calls, both = Calls(f"silu_mul {num_rows} x {width}"), 30 * random(num_rows, 2 * width)
    both[0, :2] = 200.0, -200.0
    given = calls.array(both)
    out = calls.array(np.zeros((num_rows, width), np.float32), is_kept=True)
    up = given.at(4 * width)
    calls.call("sage_silu_mul", given, 2 * width, up, 2 * width, out, num_rows, width, 3)
    gate = both[:, :width].astype(np.float64)
    with np.errstate(over="ignore"):
        wanted = silu(gate) * both[:, width:]

    def check(results: Results) -> None:
        close(results[out], wanted, rtol=1e-5, atol=1e-6)

    return Case(calls, check)


def rope(dtype: int) -> Case:
    """Rotated queries, and the keys and values in their slots: all else of the pool stays."""
    calls, num_rows, heads, kv_heads, size, block = Calls(f"rope {dtype}"), 5, 4, 2, 10, 4
    q, k, v = (random(num_rows, n * size, seed=n) for n in (heads, kv_heads, 3))
    v = v[:, : kv_heads * size]
    angles = random(7, size // 2)
    tables = np.stack([np.cos(angles), np.sin(angles)], 1)
    positions, slots = np.array([3, 0, 6, 6, 1]), np.array([11, 2, 4, 0, 7])
    kind = (np.float32, np.uint16, np.int8)[dtype]
    shape = (3, kv_heads, block, size + 2 if dtype == INT8 else size)
    keys, values = (calls.array(np.zeros(shape, kind), is_kept=True) for _ in range(2))
    out = calls.array(np.zeros(q.shape, np.float32), is_kept=True)
    calls.call(
        "sage_rope_kv_write",
        *(calls.array(q), heads * size, calls.array(k), kv_heads * size),
        *(calls.array(v), kv_heads * size, calls.array(tables), calls.array(positions)),
        *(calls.array(slots), out, keys, values, dtype),
        *(num_rows, heads, kv_heads, size, block),
    )

    def turned(x: Array) -> Array:
        a, b = np.split(x.reshape(num_rows, -1, size), 2, axis=2)
        cosine, sine = (tables[positions, side][:, None] for side in range(2))
        return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], 2)

    def check(results: Results) -> None:
        close(results[out], turned(q).reshape(num_rows, -1), atol=1e-6)
        stored = (turned(k), v.reshape(num_rows, kv_heads, size))
        for blob, wanted in zip((keys, values), stored, strict=True):
            found = results[blob].swapaxes(1, 2).reshape(-1, kv_heads, shape[-1])
            if dtype == INT8:  # a code may be its neighbour: the last bit of a product may differ
                close(decoded(found[slots]), decoded(coded(wanted)), atol=np.abs(wanted).max() / 99)
            else:
                assert (found[slots] == (bfloat(wanted) if dtype == BFLOAT else wanted)).all()
            assert not np.delete(found, slots, 0).any()

    return Case(calls, check)


def codes_of_extremes() -> Case:
    """Values in 8 bits: rows of zeros, of the least numbers, and of numbers that are not finite."""
    calls, size = Calls("codes of extremes"), 22
    v = random(5, size)
    v[0], v[1], v[3, 2], v[4, 20] = 0.0, 1e-38, np.inf, np.nan
    v[2] *= np.float32(1e30)
    out = calls.array(np.zeros((5, size), np.float32))
    values = calls.array(np.zeros((5, size + 2), np.int8), is_kept=True)
    rows, numbers = calls.array(v), calls.array(np.arange(5))
    tables = calls.array(np.ones((5, 2, size // 2), np.float32))
    calls.call(
        "sage_rope_kv_write",
        *(rows, size, rows, size, rows, size, tables, numbers, numbers, out),
        *(calls.array(np.zeros((5, size + 2), np.int8)), values, INT8, 5, 1, 1, size, 1),
    )

    def check(results: Results) -> None:
        assert (results[values][:3] == coded(v[:3])).all()
        assert np.isnan(decoded(results[values][3:])).all()

    return Case(calls, check)


def choice() -> Case:
    """The first of the largest logits that a mask allows."""
    calls, wanted = Calls("largest_allowed"), []
    numbers = np.random.default_rng(2)
    for size in (1, 31, 32, 96, 100, 1000):
        for density in (0.0, 0.02, 0.5, 1.0):
            row = numbers.standard_normal(size, np.float32).round(1)
            is_set = numbers.random(size) < density
            padded = np.pad(is_set, (0, -size % BITS)).reshape(-1, BITS)
            mask = (padded.astype(np.uint64) << np.arange(BITS, dtype=np.uint64)).sum(1)
            given = calls.array(mask.astype(np.uint32))
            calls.call("sage_largest_allowed", calls.array(row), given, size)
            wanted.append(int(np.where(is_set, row, -np.inf).argmax()) if is_set.any() else -1)

    def check(results: Results) -> None:
        assert results.returned == wanted

    return Case(calls, check)


def largest_of_all() -> Case:
    """The first of the largest logits of a row, as argmax finds it: NaN before all numbers."""
    calls, wanted = Calls("the largest of all logits"), []
    numbers = np.random.default_rng(4)
    for size in (1, 7, 511, 512, 513, 5000):
        for odd in (None, np.nan, np.inf, -np.inf):
            row = numbers.standard_normal(size, np.float32).round(2)
            if odd is not None:
                row[numbers.integers(size, size=2)] = odd
            calls.call("first_largest", calls.array(row), size)
            wanted.append(int(row.argmax()))
        calls.call("first_largest", calls.array(np.full(size, -np.inf, np.float32)), size)
        wanted.append(0)

    def check(results: Results) -> None:
        assert results.returned == wanted

    return Case(calls, check)


OPTIONS = [  # temperature, min_p, top_k, top_p
    *((1.0, 0.0, 0, 1.0), (0.3, 0.0, 0, 1.0), (2.0, 0.05, 0, 1.0), (1.0, 0.0, 1, 1.0)),
    *((0.7, 0.0, 20, 0.9), (1.5, 0.0, 5000, 0.5), (1.0, 0.0, 0, 0.99), (1.0, 0.01, 7, 0.7)),
    *((0.01, 0.0, 0, 0.95), (5.0, 0.0, 300, 0.8), (1.0, 0.0, 0, 1e-9), (1.0, 0.5, 2, 0.1)),
]


def sampled(scores: Array, number: float, option: tuple[float, float, int, float]) -> int:
    """The reference of sage_sample for one row, in float64."""
    temperature, min_p, top_k, top_p = option
    scores = scores.astype(np.float64) / temperature
    scores[scores < scores.max() + (np.log(min_p) if min_p else -np.inf)] = -np.inf
    if 0 < top_k < len(scores):
        scores[scores < np.sort(scores)[-top_k]] = -np.inf
    weights = np.exp(scores - scores.max())
    if top_p < 1:
        order = np.sort(weights)[::-1]
        place = order.cumsum().searchsorted(top_p * order.sum())
        weights[weights < order[min(place, len(order) - 1)]] = 0.0
    cumulated = weights.cumsum()
    return int(cumulated.searchsorted(number * cumulated[-1], side="right"))


def options_of(calls: Calls, rows: list[tuple[float, tuple[float, float, int, float]]]) -> Blob:
    """The options of sample.c for rows of (number, option)."""
    kind = [("temperature", "f4"), ("min_p", "f4"), ("top_p", "f8"), ("number", "f8")]
    made = [(one[0], one[1], one[3], number, one[2]) for number, one in rows]
    return calls.array(np.array(made, [*kind, ("top_k", "i8")]))


def sampling(num_rows: int, size: int) -> Case:
    """Tokens of each option, and of the least and the largest number."""
    calls, outs = Calls(f"sampling {num_rows} x {size}"), []
    scores = 3 * random(num_rows, size + 2)
    scores[0, :size] -= np.float32(50) * (np.arange(size) % 5 > 0)
    for index in range(len(OPTIONS)):
        numbers = np.random.default_rng([index, size]).random(num_rows)
        numbers[0] = (0.0, 1 - 2**-53)[index % 2]
        rows = [(n, OPTIONS[(index + r) % len(OPTIONS)]) for r, n in enumerate(numbers)]
        tokens = calls.array(np.zeros(num_rows, np.int64), is_kept=True)
        given = calls.array(scores)
        calls.call(
            "sage_sample",
            *(given, size + 2, num_rows, size, options_of(calls, rows), tokens, 1 + index % 3),
        )
        wanted = [sampled(scores[r, :size], *row) for r, row in enumerate(rows)]
        outs.append((tokens, [min(token, size - 1) for token in wanted]))

    def check(results: Results) -> None:
        assert not any(results.returned)
        for tokens, wanted in outs:
            assert results[tokens].tolist() == wanted

    return Case(calls, check)


def sampling_without_memory() -> Case:
    """No memory for the scores of a row: an error, and no token."""
    calls = Calls("sampling without memory")
    tokens = calls.array(np.full(2, 7), is_kept=True)
    options = options_of(calls, [(0.5, OPTIONS[0])] * 2)
    calls.call("allow", 0)
    calls.call("sage_sample", calls.array(random(2, 9)), 9, 2, 9, options, tokens, 2)

    def check(results: Results) -> None:
        assert results.returned[-1] == 1
        assert (results[tokens] == 7).all()

    return Case(calls, check)


def copy() -> Case:
    """Runs of bytes: copied, and summed as the xxhash library does."""
    calls, checks = Calls("copy_sum"), []
    for sizes in ([4], [1, 2, 3], [16, 1], [40, 7, 33, 1]):
        source = np.random.default_rng(sizes).integers(0, 256, 64 * sum(sizes), np.uint8)
        given = calls.array(source)
        landed = calls.array(np.zeros(len(source), np.uint8), is_kept=True)
        starts = [64 * sum(sizes[:index]) for index in range(len(sizes))]
        ends = [calls.pointers([blob.at(start) for start in starts]) for blob in (given, landed)]
        calls.call("sage_copy_sum", len(sizes), *ends, calls.array(64 * np.array(sizes)))
        checks.append((landed, source))

    def check(results: Results) -> None:
        for returned, (landed, source) in zip(results.returned, checks, strict=True):
            assert (results[landed] == source).all()
            assert returned % (1 << 64) == xxhash.xxh3_64_intdigest(source.data)

    return Case(calls, check)
