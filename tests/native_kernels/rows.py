"""Cases of kernels that compute row by row, of the choice of tokens, and of the copy."""

from collections.abc import Iterator

import numpy as np
import xxhash
from native_kernels.calls import Calls, Results
from native_kernels.cases import Case, bfloat, close, random, silu

BITS = 32


def cases() -> Iterator[Case]:
    for width, size in [(40, 40), (36, 12), (13, 13)]:
        yield norm(width, size)
    for num_rows, width in [(9, 8), (9, 21), (2, 4999)]:
        yield silu_mul(num_rows, width)
    for is_bfloat in (0, 1):
        yield rope(is_bfloat)
    yield choice()
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


def rope(is_bfloat: int) -> Case:
    """Rotated queries, and the keys and values in their slots: all else of the pool stays."""
    calls, num_rows, heads, kv_heads, size, block = Calls(f"rope {is_bfloat}"), 5, 4, 2, 10, 4
    q, k, v = (random(num_rows, n * size, seed=n) for n in (heads, kv_heads, 3))
    v = v[:, : kv_heads * size]
    angles = random(7, size // 2)
    tables = np.stack([np.cos(angles), np.sin(angles)], 1)
    positions, slots = np.array([3, 0, 6, 6, 1]), np.array([11, 2, 4, 0, 7])
    shape, kind = (3, kv_heads, block, size), np.uint16 if is_bfloat else np.float32
    keys, values = (calls.array(np.zeros(shape, kind), is_kept=True) for _ in range(2))
    out = calls.array(np.zeros(q.shape, np.float32), is_kept=True)
    calls.call(
        "sage_rope_kv_write",
        *(calls.array(q), heads * size, calls.array(k), kv_heads * size),
        *(calls.array(v), kv_heads * size, calls.array(tables), calls.array(positions)),
        *(calls.array(slots), out, keys, values, is_bfloat),
        *(num_rows, heads, kv_heads, size, block),
    )

    def turned(x: np.ndarray) -> np.ndarray:
        a, b = np.split(x.reshape(num_rows, -1, size), 2, axis=2)
        cosine, sine = (tables[positions, side][:, None] for side in range(2))
        return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], 2)

    def check(results: Results) -> None:
        close(results[out], turned(q).reshape(num_rows, -1), atol=1e-6)
        stored = (turned(k), v.reshape(num_rows, kv_heads, size))
        for blob, wanted in zip((keys, values), stored, strict=True):
            found = results[blob].swapaxes(1, 2).reshape(-1, kv_heads, size)
            assert (found[slots] == (bfloat(wanted) if is_bfloat else wanted)).all()
            assert not np.delete(found, slots, 0).any()

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
