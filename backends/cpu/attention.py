"""Paged attention: in C, or in torch: single rows together, more of them in chunks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from sagellm.backends.cpu.binding import Binding
from sagellm.backends.cpu.native.library import NativeKernels
from sagellm.backends.cpu.step import Step
from sagellm.graphs.kernels.attention import PagedAttention

_CHUNK = 64  # query rows at a time: scores stay in the cache

# From q [T, heads * head_dim] to the same shape, over the pool as it is now.
Attention: TypeAlias = Callable[[Step, torch.Tensor], torch.Tensor]


def attention(options: PagedAttention, binding: Binding) -> Attention:
    """How this program attends: the C kernel where it may be used, else torch."""
    if binding.native:
        return partial(_native, options, binding.native)
    if binding.deterministic:
        return lambda step, q: row_by_row(options, step, q)
    return partial(_split, options)


def _native(
    options: PagedAttention, kernels: NativeKernels, step: Step, q: torch.Tensor
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
    )


@dataclass(frozen=True, slots=True)
class Split:
    """The rows of sequences with one new row, and (sequence, rows) of each of the others."""

    short: torch.Tensor
    long: tuple[tuple[int, slice], ...]


def _split(options: PagedAttention, step: Step, q: torch.Tensor) -> torch.Tensor:
    """Sequences with one new row all at once; the others one by one."""
    split = step.once("split", lambda: _split_of(step))
    if not split.long:
        return decode(options, step, q, split.short)
    out = torch.empty_like(q)
    if len(split.short):
        out[split.short] = decode(options, step, q[split.short], split.short)
    for sequence, rows in split.long:
        out[rows] = attend(options, step, q[rows], sequence, step.inputs.contexts[sequence])
    return out


def _split_of(step: Step) -> Split:
    short: list[int] = []
    long, start = [], 0
    for sequence, num_rows in enumerate(step.inputs.query_lens):
        rows = range(start, start + num_rows)
        if num_rows == 1:
            short += rows
        else:
            long.append((sequence, slice(rows.start, rows.stop)))
        start += num_rows
    return Split(torch.tensor(short, dtype=torch.int64), tuple(long))


def row_by_row(options: PagedAttention, step: Step, q: torch.Tensor) -> torch.Tensor:
    """Each row over its own context: shapes do not depend on the batch, so bits do not either."""
    sequences = step.row_sequences.tolist()
    contexts = (step.inputs.positions + 1).tolist()
    each = zip(torch.split(q, 1), sequences, contexts, strict=True)
    return torch.cat([attend(options, step, row.clone(), *place) for row, *place in each])


def attend(
    options: PagedAttention, step: Step, q: torch.Tensor, sequence: int, context: int
) -> torch.Tensor:
    """q at the last positions before `context` of one sequence, in chunks of query rows."""
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
    """Rows at positions first, first + 1, ...; keys and values [kv_heads, context, head_dim]."""
    num_rows, kv_heads = len(q), options.num_kv_heads
    low = 0 if options.window is None else max(0, first - options.window + 1)
    keys, values = keys[:, low : first + num_rows], values[:, low : first + num_rows]
    heads = q.view(num_rows, kv_heads, -1, options.head_dim).permute(1, 2, 0, 3)
    folded = heads.reshape(kv_heads, -1, options.head_dim)  # a group's heads, each with all rows
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
    """One-row sequences. `tables` [B, M]; `hidden` [B, 1, 1, M * block_size] is what none sees."""

    tables: torch.Tensor
    hidden: torch.Tensor


def decode(
    options: PagedAttention, step: Step, q: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """One row a sequence: the heads of a group are the rows of a batched product."""
    kind = options.window, options.table
    batch = step.once(("decode", kind), lambda: _decode_batch(step, rows, *kind))
    keys, values = (_dense(step.pool[options.layer, side], batch.tables) for side in (0, 1))
    grouped = q.view(len(q), options.num_kv_heads, -1, options.head_dim) * options.scale
    scores = (grouped @ keys.transpose(2, 3)).masked_fill_(batch.hidden, -torch.inf)
    values.masked_fill_(batch.hidden.transpose(2, 3), 0)  # 0 * NaN of a block's last user is NaN
    return (scores.softmax(-1) @ values).view(len(q), -1)


def _decode_batch(step: Step, rows: torch.Tensor, window: int | None, table: int) -> DecodeBatch:
    block_size = step.pool.shape[4]
    sequences = step.row_sequences[rows]
    at = step.inputs.positions[rows, None]
    num_blocks = int(at.max()) // block_size + 1
    hidden = _hidden(torch.arange(num_blocks * block_size), at, window)
    return DecodeBatch(step.tables(table)[sequences, :num_blocks], hidden[:, None, None])


def _hidden(places: torch.Tensor, at: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which of `places` a row at position `at` does not see."""
    ahead = places > at
    return ahead if window is None else ahead | (places <= at - window)


def _gathered(
    step: Step, options: PagedAttention, sequence: int, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_blocks = -(-context // step.pool.shape[4])
    table = step.tables(options.table)[sequence : sequence + 1, :num_blocks]
    keys, values = (_dense(step.pool[options.layer, side], table)[0] for side in (0, 1))
    return keys, values


def _dense(side: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """[B, kv_heads, M * block_size, head_dim] float32 of blocks [blocks, kv_heads, size, dim]."""
    picked = side[tables.long()].transpose(1, 2)  # [B, kv_heads, M, block_size, head_dim]
    return picked.flatten(2, 3).float()
