"""Rotary position embeddings, and paged attention in C or in torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeAlias

import torch

from sagellm.backends.cpu.binding import Binding, ForwardContext
from sagellm.backends.cpu.native.library import NativeKernels
from sagellm.graphs.kernels.token_mixers import PagedAttention, Rope

_FEWEST = 256  # positions of the smallest table
_CHUNK = 64  # query rows at a time, so that their scores fit in the CPU's cache

# Maps q [T, heads * head_dim] to the result, of the same shape, over the step's pool.
Attention: TypeAlias = Callable[[ForwardContext, torch.Tensor], torch.Tensor]


class RopeTables:
    """Cosines and sines by position: [positions, 2, head_dim / 2] float32, grown by doubling.

    Angles are float32 products, as in transformers, so that far positions agree with its results.
    """

    def __init__(self, options: Rope) -> None:
        self._frequencies = frequencies(options)
        self._tables = self._made(_FEWEST)

    def up_to(self, num_positions: int) -> torch.Tensor:
        """The tables, grown to at least `num_positions` positions."""
        tables = self._tables  # read once: another engine's thread may set shorter ones meanwhile
        if num_positions > len(tables):
            tables = self._tables = self._made(1 << (num_positions - 1).bit_length())
        return tables

    def _made(self, num_positions: int) -> torch.Tensor:
        places = torch.arange(num_positions, dtype=torch.float32)
        angles = torch.outer(places, self._frequencies)
        return torch.stack([angles.cos(), angles.sin()], 1)


@cache
def rope_tables(options: Rope) -> RopeTables:
    """The tables for `options`, which all layers and programs share."""
    return RopeTables(options)


def frequencies(options: Rope) -> torch.Tensor:
    """The angle in radians by which one position turns each pair, scaled: [head_dim / 2]."""
    steps = torch.arange(0, options.head_dim, 2, dtype=torch.int64).float() / options.head_dim
    plain = 1.0 / options.theta**steps
    if options.scaling == "linear":
        return plain / options.factor
    return _llama3(plain, options) if options.scaling == "llama3" else plain


def _llama3(plain: torch.Tensor, options: Rope) -> torch.Tensor:
    """Scale low frequencies, keep high ones, and interpolate between them (Llama 3.1 release)."""
    turns = options.original_max_len / (2 * math.pi / plain)  # full turns in the original context
    low, high = options.low_freq_factor, options.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * plain / options.factor + kept * plain


def rotated(rows: torch.Tensor, tables: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate every head of rows [T, heads * head_dim]: its halves (a, b) become
    (a cos - b sin, b cos + a sin).
    """
    cosine, sine = tables[positions][:, None].unbind(2)  # [T, 1, head_dim / 2]
    first, second = rows.reshape(len(rows), -1, 2, tables.shape[2]).unbind(2)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.stack(turned, 2).flatten(1)


def attention(options: PagedAttention, binding: Binding) -> Attention:
    """The attention of a program: the C kernel if there is one, else torch."""
    if binding.native:
        return partial(_native, options, binding.native, binding.uses_tiles)
    if binding.deterministic:
        return lambda step, q: attend_row_by_row(options, step, q)
    return partial(_split, options)


def _native(
    options: PagedAttention,
    kernels: NativeKernels,
    tiles: bool,
    step: ForwardContext,
    q: torch.Tensor,
) -> torch.Tensor:
    return kernels.attention(
        q,
        pool=step.pool,
        layer=options.layer,
        block_tables=step.tables(options.table),
        query_starts=step.inputs.query_starts,
        context_lens=step.inputs.context_lens,
        scale=options.scale,
        window=options.window,
        tiles=tiles,
    )


@dataclass(frozen=True, slots=True)
class _Split:
    """The rows of a batch. `short`: the rows of sequences with one new row; `long`: (sequence, its
    rows) for every other sequence.
    """

    short: torch.Tensor
    long: tuple[tuple[int, slice], ...]


def _split(options: PagedAttention, step: ForwardContext, q: torch.Tensor) -> torch.Tensor:
    """Attend with all sequences of one new row at once, and with the other sequences one by one."""
    split = step.once("split", lambda: _split_of(step))
    if not split.long:
        return decode(options, step, q, split.short)
    out = torch.empty_like(q)
    if len(split.short):
        out[split.short] = decode(options, step, q[split.short], split.short)
    for sequence, rows in split.long:
        out[rows] = attend(options, step, q[rows], sequence, step.inputs.contexts[sequence])
    return out


def _split_of(step: ForwardContext) -> _Split:
    short: list[int] = []
    long, start = [], 0
    for sequence, num_rows in enumerate(step.inputs.query_lens):
        rows = range(start, start + num_rows)
        if num_rows == 1:
            short += rows
        else:
            long.append((sequence, slice(rows.start, rows.stop)))
        start += num_rows
    return _Split(torch.tensor(short, dtype=torch.int64), tuple(long))


def attend_row_by_row(
    options: PagedAttention, step: ForwardContext, q: torch.Tensor
) -> torch.Tensor:
    """Attend with one row at a time: neither shapes nor bits depend on the batch."""
    sequences = step.row_sequences.tolist()
    contexts = (step.inputs.positions + 1).tolist()
    each = zip(torch.split(q, 1), sequences, contexts, strict=True)
    return torch.cat([attend(options, step, row.clone(), *place) for row, *place in each])


def attend(
    options: PagedAttention, step: ForwardContext, q: torch.Tensor, sequence: int, context: int
) -> torch.Tensor:
    """Attend with the last rows of one sequence of `context` tokens, in chunks of query rows."""
    keys, values = _gathered(step, options, sequence, context)
    first = context - len(q)
    chunks = []
    for top in range(0, len(q), _CHUNK):
        rows = q[top : top + _CHUNK]
        chunks.append(_chunk(options, rows, keys, values, first + top))
    return torch.cat(chunks)


def _chunk(
    options: PagedAttention, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int
) -> torch.Tensor:
    """Attend with the rows of q, whose positions begin at `first`. Keys and values: [kv_heads,
    context, head_dim].
    """
    num_rows, kv_heads = len(q), options.num_kv_heads
    low = 0 if options.window is None else max(0, first - options.window + 1)
    keys, values = keys[:, low : first + num_rows], values[:, low : first + num_rows]
    heads = q.view(num_rows, kv_heads, -1, options.head_dim).permute(1, 2, 0, 3)
    folded = heads.reshape(kv_heads, -1, options.head_dim)  # the rows of all heads of a group
    scores = torch.bmm(folded * options.scale, keys.transpose(1, 2))
    scores = scores.view(kv_heads, -1, num_rows, keys.shape[1])
    at = torch.arange(first, first + num_rows)[:, None]
    scores.masked_fill_(
        _hidden(torch.arange(low, first + num_rows), at, options.window), -torch.inf
    )
    mixed = torch.bmm(scores.softmax(-1).view(kv_heads, -1, keys.shape[1]), values)
    return mixed.view(kv_heads, -1, num_rows, options.head_dim).permute(2, 0, 1, 3).flatten(1)


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """Sequences with one new row: their block `tables` [B, M], and `hidden` [B, 1, 1, M *
    block_size], which is true at masked positions.
    """

    tables: torch.Tensor
    hidden: torch.Tensor


def decode(
    options: PagedAttention, step: ForwardContext, q: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Attend with one row per sequence: the heads of a group are the rows of a batched product."""
    kind = options.window, options.table
    batch = step.once(("decode", kind), lambda: _decode_batch(step, rows, *kind))
    keys, values = (_dense(step.pool[options.layer, side], batch.tables) for side in (0, 1))
    grouped = q.view(len(q), options.num_kv_heads, -1, options.head_dim) * options.scale
    scores = (grouped @ keys.transpose(2, 3)).masked_fill_(batch.hidden, -torch.inf)
    # Masked values have a weight of 0, but 0 times a NaN of the block's previous user is NaN.
    values.masked_fill_(batch.hidden.transpose(2, 3), 0)
    return (scores.softmax(-1) @ values).view(len(q), -1)


def _decode_batch(
    step: ForwardContext, rows: torch.Tensor, window: int | None, table: int
) -> DecodeBatch:
    block_size = step.pool.shape[4]
    sequences = step.row_sequences[rows]
    at = step.inputs.positions[rows, None]
    num_blocks = int(at.max()) // block_size + 1
    hidden = _hidden(torch.arange(num_blocks * block_size), at, window)
    return DecodeBatch(step.tables(table)[sequences, :num_blocks], hidden[:, None, None])


def _hidden(places: torch.Tensor, at: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether a row at position `at` must not attend to each of the positions `places`."""
    later = places > at
    return later if window is None else later | (places <= at - window)


def _gathered(
    step: ForwardContext, options: PagedAttention, sequence: int, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and the values of one sequence: [kv_heads, M * block_size, head_dim] float32."""
    num_blocks = -(-context // step.pool.shape[4])
    table = step.tables(options.table)[sequence : sequence + 1, :num_blocks]
    keys, values = (_dense(step.pool[options.layer, side], table)[0] for side in (0, 1))
    return keys, values


def _dense(side: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Gather blocks [blocks, kv_heads, size, dim] to [B, kv_heads, M * size, dim] float32."""
    picked = side[tables.long()].transpose(1, 2)  # [B, kv_heads, M, block_size, head_dim]
    return picked.flatten(2, 3).float()
