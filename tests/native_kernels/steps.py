"""Cases of whole steps: one layer of a transformer, fused and with separate ops, and refusals."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from native_kernels.attention import Pool, Shape, attended
from native_kernels.calls import Blob, Calls, Results
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
)

from sagellm.backends.cpu.native.c_structs import (
    SIZED,
    NativeBatch,
    NativeHeads,
    NativeInstruction,
    NativeStep,
)
from sagellm.backends.cpu.translation import _OPS

VOCABULARY, WIDTH, INNER, EPSILON = 19, 24, 64, 1e-5
HEADS = Shape(heads=4, kv_heads=2, head_dim=6, block_size=4)
# Two sequences: three new tokens behind two, and two new tokens.
TOKENS, POSITIONS, STARTS, LENS = [3, 18, 0, 7, 7], [2, 3, 4, 0, 1], [0, 3, 5], [5, 2]
TABLES, LOGIT_ROWS = [[2, 1], [3, 0]], [2, 4, 2]
BLOCKS, ROWS = 4, len(TOKENS)
SLOTS = [10, 11, 4, 12, 13]
DONE, NO_MEMORY, NO_SUCH_TOKEN = range(3)
PACKED = 2  # the TableForm of a packed weight


def cases() -> Iterator[Case]:
    for is_bfloat in (False, True):
        yield step(is_bfloat, is_fused=True, is_gated=True)
        yield step(is_bfloat, is_fused=False, is_gated=False)
        yield step(is_bfloat, is_fused=True, is_gated=True, is_packed=True)
    # The weight of a linear of one row is prefetched.
    yield step(False, is_fused=True, is_gated=True, logit_rows=[2])
    yield refused("a token that is none", [*TOKENS[:-1], VOCABULARY], -1, NO_SUCH_TOKEN)
    yield refused("a negative token", [-1, *TOKENS[1:]], -1, NO_SUCH_TOKEN)
    yield refused("a step without memory", TOKENS, 0, NO_MEMORY)
    yield sizes()


@dataclass(frozen=True)
class Matrix:
    """A matrix in the arena, and what it should hold."""

    view: tuple[int, int, int]
    value: Array

    def columns(self, first: int, last: int) -> "Matrix":
        number, _, width = self.view
        return Matrix((number, first, width), self.value[:, first:last])


@dataclass
class Program:
    """The instructions of a step, with the reference of each result."""

    calls: Calls
    is_bfloat: bool
    logit_rows: list[int] = field(default_factory=lambda: LOGIT_ROWS)
    rows: list[dict[str, Any]] = field(default_factory=list)
    floats: int = 0
    last: Array = field(default_factory=lambda: np.zeros(0))

    def add(self, op: str, inlets: list[Matrix], values: list[Array], **fields: Any) -> Any:
        """Append an instruction whose results are `values`, each in memory of its own."""
        outlets = [
            Matrix((self._take(value.shape[1]), 0, value.shape[1]), value) for value in values
        ]
        self.last = values[0] if values else self.last
        row = {"op": _OPS.index(op), "waits": 1, **fields}
        row["width"] = values[0].shape[1] if values else inlets[0].value.shape[1]
        self.rows.append(row)
        for name, matrices in (("inlets", inlets), ("outlets", outlets)):
            row[name] = tuple(matrix.view for matrix in matrices)
        return outlets[0] if len(outlets) == 1 else outlets

    def _take(self, width: int) -> int:
        self.floats += width
        return self.floats - width

    def norm(self, rows: Matrix, *more: Matrix) -> Any:
        weight = random(WIDTH, seed=len(self.rows))
        total = np.sum([matrix.value for matrix in (rows, *more)], axis=0)
        value = total / np.sqrt((total**2).mean(1, keepdims=True) + EPSILON) * weight
        op, values = ("add_rms_norm", [total, value]) if more else ("rms_norm", [value])
        given = {"weight": self.calls.array(weight), "size": WIDTH, "epsilon": EPSILON}
        return self.add(op, [rows, *more], values, **given)

    def linear(self, rows: Matrix, num_cols: int, **fields: Any) -> Any:
        weight = random(num_cols, rows.value.shape[1], seed=len(self.rows)) / 8
        packed = packed_linear(self.calls, weight, None, "float")
        return self.add("linear", [rows], [rows.value @ weight.T], weight=packed, **fields)

    def gated(self, rows: Matrix, is_gated: bool) -> Any:
        weight = random(2 * INNER, rows.value.shape[1]) / 4
        packed = packed_linear(self.calls, weight, None, "float", gated=is_gated)
        both = rows.value @ weight.T
        gate, up = np.split(both, 2, 1)
        return self.add("gated_linear", [rows], [silu(gate) * up, both], weight=packed)[0]

    def logits(self) -> None:
        """Let the last result be the logits."""
        ((_, column, width),) = self.rows[-1]["outlets"]
        self.rows[-1]["outlets"] = ((-1, column, width),)


def rotated(rows: Array, tables: Array) -> Array:
    size = HEADS.head_dim
    a, b = np.split(rows.reshape(ROWS, -1, size), 2, axis=2)
    cosine, sine = (tables[POSITIONS, side][:, None] for side in range(2))
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], 2).reshape(ROWS, -1)


def embedding(program: Program, table: Array, *, is_packed: bool) -> Any:
    """The rows of the tokens, from a table of rows or from a packed weight."""
    calls, form = program.calls, int(program.is_bfloat)  # a TableForm of rows.h
    stored = bfloat(table) if program.is_bfloat else table
    given = calls.array(stored)
    if is_packed:
        given, form = packed_linear(calls, stored, None, KINDS[form]), PACKED
    value = table[TOKENS].astype(np.float64)
    return program.add("embedding", [], [value], weight=given, table_form=form, size=VOCABULARY)


def layer(
    program: Program, *, is_fused: bool, is_gated: bool, is_packed: bool = False
) -> tuple[Blob, Blob]:
    """One layer from tokens to logits. Returns the pool, and the tables of rope."""
    calls, as_stored = program.calls, rounded if program.is_bfloat else lambda numbers: numbers
    table = as_stored(random(VOCABULARY, WIDTH, seed=9))
    angles = random(8, HEADS.head_dim // 2)
    turns = np.stack([np.cos(angles), np.sin(angles)], 1)
    hidden = embedding(program, table, is_packed=is_packed)
    kv, heads = HEADS.kv_heads * HEADS.head_dim, HEADS.heads * HEADS.head_dim
    joined = program.linear(program.norm(hidden), heads + 2 * kv)
    q = joined.columns(0, heads)
    k, v = joined.columns(heads, heads + kv), joined.columns(heads + kv, heads + 2 * kv)
    keys, values = rotated(k.value, turns), v.value
    size = {"size": HEADS.head_dim}
    if is_fused:
        q = program.add("rope_kv_write", [q, k, v], [rotated(q.value, turns)], **size)
    else:
        q = program.add("rope", [q], [rotated(q.value, turns)], **size)
        k = program.add("rope", [k], [keys], **size)
        program.add("kv_write", [k, v], [], **size)
    pool, stored = filled_pool(calls, as_stored, keys, values, program.is_bfloat)
    each = q.value.reshape(ROWS, HEADS.heads, HEADS.head_dim)
    parts = [attended(HEADS, pool, 0, 2, each[:3]), attended(HEADS, pool, 1, 0, each[3:])]
    mixed = program.add("paged_attention", [q], [np.concatenate(parts).reshape(ROWS, heads)])
    hidden, normed = program.norm(hidden, program.linear(mixed, WIDTH))
    opened = program.gated(normed, is_gated)
    if not is_fused:
        opened = separate_ops(program, opened)
    more = program.linear(opened, WIDTH)
    hidden = program.add("add", [hidden, more], [hidden.value + more.value])
    chosen = program.add("select_rows", [hidden], [hidden.value[program.logit_rows]], chosen=1)
    program.linear(chosen, VOCABULARY, chosen=1)
    program.logits()
    return stored, calls.array(turns)


def separate_ops(program: Program, rows: Matrix) -> Matrix:
    """What fused programs have no need of: silu, mul, silu_mul."""
    opened = program.add("silu", [rows], [silu(rows.value)])
    product = program.add("mul", [opened, rows], [opened.value * rows.value])
    result: Matrix = program.add("silu_mul", [product, rows], [silu(product.value) * rows.value])
    return result


def filled_pool(
    calls: Calls, as_stored: Any, keys: Array, values: Array, is_bfloat: bool
) -> tuple[Pool, Blob]:
    """What a step finds in the pool, with what it should write: the reference and the memory."""
    shape = (2, BLOCKS, HEADS.kv_heads, HEADS.block_size, HEADS.head_dim)
    memory = random(*shape)
    earlier = memory[:, 2, :, :2].swapaxes(1, 2)  # positions 0 and 1 of the first sequence
    sides = []
    for side, rows in enumerate((keys, values)):
        new = as_stored(rows.astype(np.float32).reshape(ROWS, HEADS.kv_heads, HEADS.head_dim))
        sides.append([np.concatenate([as_stored(earlier[side]), new[:3]]), new[3:]])
    stored = calls.array(bfloat(memory) if is_bfloat else memory, is_kept=True)
    return Pool(sides[0], sides[1], memory[0], memory[1], []), stored


def step_struct(
    program: Program, pool: Blob, turns: Blob, tokens: list[int], **fields: Any
) -> Blob:
    """The struct of a step with its inputs."""
    calls, size = program.calls, 2 if program.is_bfloat else 4
    side = BLOCKS * HEADS.kv_heads * HEADS.block_size * HEADS.head_dim * size
    heads = {"heads": HEADS.heads, "kv_heads": HEADS.kv_heads, "head_dim": HEADS.head_dim}
    kinds = calls.struct(NativeHeads, **heads, scale=np.float32(HEADS.head_dim**-0.5))
    inputs = {"token_ids": tokens, "positions": POSITIONS, "slots": SLOTS}
    inputs["logit_rows"] = program.logit_rows
    blobs = {name: calls.array(np.array(numbers)) for name, numbers in inputs.items()}
    batch = NativeBatch(2, 2, HEADS.block_size, None, None, program.is_bfloat)
    made = calls.struct(
        NativeStep,
        instructions=calls.structs(NativeInstruction, program.rows),
        heads=kinds,
        tables=calls.pointers([turns]),
        num_instructions=len(program.rows),
        num_heads=1,
        batch=batch,
        pool=pool,
        block_tables=calls.array(np.array(TABLES, np.int32)),
        **{"layer_bytes": 2 * side, "side_bytes": side},
        **{"kv_heads": HEADS.kv_heads, "head_dim": HEADS.head_dim},
        **{"num_rows": ROWS, "num_logit_rows": len(program.logit_rows), "capacity": ROWS},
        arena=calls.array(np.zeros(program.floats * ROWS, np.float32)),
        **blobs,
        **fields,
    )
    inner = NativeStep.batch.offset
    for name, numbers in (("query_starts", STARTS), ("context_lens", LENS)):
        at = inner + getattr(NativeBatch, name).offset
        target = calls.array(np.array(numbers))
        calls.links.append((made.number, at, target.number, 0))
    return made


def step(
    is_bfloat: bool,
    *,
    is_fused: bool,
    is_gated: bool,
    is_packed: bool = False,
    logit_rows: list[int] = LOGIT_ROWS,
) -> Case:
    """A step on several numbers of threads, measured and not: near the reference, equal bits."""
    calls = Calls(f"step, bfloat {is_bfloat}, fused {is_fused}, {len(logit_rows)} logits")
    program = Program(calls, is_bfloat, logit_rows)
    pool, turns = layer(program, is_fused=is_fused, is_gated=is_gated, is_packed=is_packed)
    wanted, outs, codes = program.last, [], []
    times = calls.array(np.zeros(len(program.rows) + 1, np.int64), is_kept=True)
    largest = calls.array(np.full(len(logit_rows), -1), is_kept=True)
    for threads, extra in ((1, {}), (3, {"largest": largest}), (2, {"times": times})):
        out = calls.array(np.zeros(wanted.shape, np.float32), is_kept=True)
        made = step_struct(program, pool, turns, TOKENS, logits=out, **extra)
        codes += [calls.call("sage_step_run", made, threads) for _ in range(2)]
        calls.call("sage_step_close", made)
        outs.append(out)

    def check(results: Results) -> None:
        assert [results.returned[code] for code in codes] == [DONE] * len(codes)
        close(results[outs[0]], wanted, atol=5e-2 if is_bfloat else 1e-4)
        assert all((results[out] == results[outs[0]]).all() for out in outs)
        assert (results[largest] == results[outs[1]].argmax(1)).all()
        assert (np.diff(results[times]) >= 0).all()
        assert results[times].min() > 0

    return Case(calls, check)


def refused(name: str, tokens: list[int], allowed: int, code: int) -> Case:
    """A step that is refused, and leaves the logits as they were."""
    calls = Calls(name)
    program = Program(calls, False)
    pool, turns = layer(program, is_fused=True, is_gated=True)
    out = calls.array(np.full((len(LOGIT_ROWS), VOCABULARY), 7.0, np.float32), is_kept=True)
    made = step_struct(program, pool, turns, tokens, logits=out)
    calls.call("allow", allowed)
    found = calls.call("sage_step_run", made, 2)
    calls.call("sage_step_close", made)

    def check(results: Results) -> None:
        assert results.returned[found] == code
        assert (results[out] == 7.0).all()

    return Case(calls, check)


def sizes() -> Case:
    """The structs have the same sizes here as in Python."""
    calls = Calls("sizes of structs")
    found = calls.array(np.zeros(len(SIZED), np.int64), is_kept=True)
    calls.call("sage_sizes", found)

    def check(results: Results) -> None:
        assert results[found].tolist() == [ctypes.sizeof(kind) for kind in SIZED]

    return Case(calls, check)
