"""Cases of paged attention: ragged batches, windows, any heads, all dtypes of the pool."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from native_kernels.calls import Calls, Results
from native_kernels.cases import Array, Case, bfloat, coded, decoded, random, rounded

from sagellm.backends.cpu.native.c_structs import NativeBatch, NativeHeads, NativeLayer

Rows = Sequence[tuple[int, int, int]]  # sequence, first position, end position
DECODE: Rows = [(0, 1199, 1200), (1, 89, 90), (2, 6, 7), (1, 0, 1), (0, 511, 512), (0, 512, 513)]
FLOAT, BFLOAT, INT8 = range(3)  # the dtypes of codes.h
RAGGED: Rows = [(0, 570, 600), (2, 0, 7), (1, 60, 90), (0, 1190, 1200)]


@dataclass(frozen=True)
class Shape:
    """The heads of a layer, and the blocks of the pool."""

    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    window: int = 0
    dtype: int = FLOAT


@dataclass(frozen=True)
class Pool:
    """Keys and values by sequence [length, kv_heads, head_dim], and where they are stored."""

    keys: list[Array]
    values: list[Array]
    stored_keys: Array  # [blocks, kv_heads, block_size], rows of the dtype
    stored_values: Array
    tables: list[Array]


def cases() -> Iterator[Case]:
    for dtype in (FLOAT, BFLOAT, INT8):
        for window in (0, 1, 70, 700):
            for rows in (DECODE, RAGGED):
                yield attention(Shape(window=window, dtype=dtype), rows)
        for shape in [(1, 1, 8, 1), (5, 5, 24, 3), (14, 2, 64, 32), (9, 1, 10, 16), (70, 1, 13, 5)]:
            rows = [(0, 149, 150), (1, 3, 40), (0, 80, 100)]
            yield attention(Shape(*shape, dtype=dtype), rows, (150, 40))
        yield attention(Shape(130, 1, 36, 128, dtype=dtype), [(0, 30, 33)], (33,))
    yield many_spans()


def tile_cases() -> Iterator[Case]:
    """Cases of the paths that have tiles, which multiply rows of a head_dim of whole tiles."""
    for dtype in (BFLOAT, INT8):
        for window in (0, 70):
            shape = Shape(head_dim=32, window=window, dtype=dtype)
            yield attention(shape, [(0, 300, 340), (1, 0, 9), (0, 339, 340)], (340, 90), tiles=1)
        yield attention(Shape(2, 1, 96, dtype=dtype), [(0, 0, 50)], (50,), tiles=1)


def pool_of(shape: Shape, lens: Sequence[int]) -> Pool:
    """A pool with these sequences in scattered blocks. Numbers that nobody may read are NaN."""
    size, numbers = shape.block_size, np.random.default_rng(4)
    counts = [-(-length // size) for length in lens]
    order = numbers.permutation(sum(counts)) + 1
    tables = np.split(order.astype(np.int32), np.cumsum(counts)[:-1])
    of_pool = (sum(counts) + 1, shape.kv_heads, size, shape.head_dim)
    sides = []
    for side in range(2):
        numbers_of = [
            random(length, shape.kv_heads, shape.head_dim, seed=7 + side) for length in lens
        ]
        stored = np.full(of_pool, np.nan, np.float32)
        for sequence, table in zip(numbers_of, tables, strict=True):
            for index, block in enumerate(table):
                some = sequence[index * size : (index + 1) * size]
                stored[block, :, : len(some)] = some.swapaxes(0, 1)
        nan = np.isnan(stored)
        if shape.dtype == BFLOAT:
            numbers_of = [rounded(sequence) for sequence in numbers_of]
            stored = np.where(nan, np.uint16(0x7FC0), bfloat(np.where(nan, 0, stored)))
        elif shape.dtype == INT8:
            numbers_of = [decoded(coded(sequence)) for sequence in numbers_of]
            scale_is_nan = np.frombuffer(b"\xc0\x7f" * (stored.size // shape.head_dim), np.int8)
            codes = coded(np.where(nan, 0, stored))
            codes[..., -2:] = np.where(
                nan[..., :1], scale_is_nan.reshape(*stored.shape[:-1], 2), codes[..., -2:]
            )
            stored = codes
        sides.append((numbers_of, stored))
    (keys, stored_keys), (values, stored_values) = sides
    return Pool(keys, values, stored_keys, stored_values, tables)


def attended(shape: Shape, pool: Pool, sequence: int, first: int, q: Array) -> Array:
    """The reference: q [rows, heads, head_dim], of positions from `first` on, in float64."""
    group = shape.heads // shape.kv_heads
    keys, values = (
        side[sequence].repeat(group, 1).astype(np.float64) for side in (pool.keys, pool.values)
    )
    out = np.zeros(q.shape)
    for row, position in enumerate(range(first, first + len(q))):
        low = max(0, position - shape.window + 1) if shape.window else 0
        seen = slice(low, position + 1)
        scores = np.einsum("hd,khd->hk", q[row], keys[seen]) * scale_of(shape)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        out[row] = np.einsum("hk,khd->hd", weights, values[seen])
    return out


def scale_of(shape: Shape) -> np.float32:
    return np.float32(shape.head_dim**-0.5)


def attention(
    shape: Shape, rows: Rows, lens: Sequence[int] = (1200, 90, 7), tiles: int = 0
) -> Case:
    """A batch on other numbers of threads: near the reference, and the same bits."""
    calls, pool = (
        Calls(f"attention {shape} of {len(rows)} sequences, tiles {tiles}"),
        pool_of(shape, lens),
    )
    q = [2 * random(end - first, shape.heads, shape.head_dim) for _, first, end in rows]
    heads = calls.struct(
        NativeHeads, **{name: getattr(shape, name) for name in ("heads", "kv_heads", "head_dim")},
        window=shape.window, scale=scale_of(shape),
    )  # fmt: skip
    tables = np.zeros((len(rows), max(map(len, pool.tables))), np.int32)
    for index, (sequence, *_) in enumerate(rows):
        tables[index, : len(pool.tables[sequence])] = pool.tables[sequence]
    starts = np.cumsum([0, *(end - first for _, first, end in rows)])
    batch = calls.struct(
        NativeBatch,
        table_len=tables.shape[1],
        num_sequences=len(rows),
        block_size=shape.block_size,
        query_starts=calls.array(starts),
        context_lens=calls.array(np.array([end for *_, end in rows])),
        dtype=shape.dtype,
        tiles=tiles,
    )
    joined = np.concatenate(q).reshape(starts[-1], -1)
    width = joined.shape[1]
    memory = {
        "q": calls.array(np.pad(joined, ((0, 0), (0, 5)))),
        "keys": calls.array(pool.stored_keys),
        "values": calls.array(pool.stored_values),
        "tables": calls.array(tables),
    }
    outs = []
    for threads in (1, 2, 5):
        out = calls.array(np.full((starts[-1], width), 7.0, np.float32), is_kept=True)
        layer = calls.struct(NativeLayer, **memory, out=out, ldq=width + 5, ldo=width)
        calls.call("sage_attention", heads, batch, layer, threads)
        outs.append(out)
    calls.call("sage_has_pairs")

    def check(results: Results) -> None:
        *failed, has_pairs = results.returned
        assert not any(failed)
        found = results[outs[0]]
        assert all((results[out] == found).all() for out in outs)
        # Where a CPU multiplies pairs, queries and weights of softmax may be rounded.
        errors = [error(found, as_rounded) for as_rounded in (False, True)]
        allowed = 4e-3 if has_pairs and shape.dtype != FLOAT else 2e-5
        assert errors[0] < 2e-5 or (has_pairs and errors[1] < allowed), errors

    def error(found: Array, as_rounded: bool) -> float:
        scale, parts = scale_of(shape), []
        for (sequence, first, _), one in zip(rows, q, strict=True):
            seen = rounded(one * scale) / scale if as_rounded else one
            parts.append(attended(shape, pool, sequence, first, seen).reshape(len(one), -1))
        return float(np.abs(found - np.concatenate(parts)).max())

    return Case(calls, check)


def many_spans() -> Case:
    """A batch whose sums of spans would take more than 64 MiB: no thread shares a context."""
    shape, count = Shape(heads=1, kv_heads=1, head_dim=128, block_size=128, window=4), 540
    return attention(shape, [(0, 513, 514)] * count, (514,))
