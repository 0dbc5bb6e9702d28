"""Attention on torch tensors: paged attention, in C or in torch, linear attention with the states
of sequences in blocks of the KV pool, and the context of the step that they read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, TypeVar, cast

import torch
import torch.nn.functional as F

from sagellm.backends.arrays import Array
from sagellm.backends.cpu.binding import Binding
from sagellm.backends.cpu.native.library import NativeKernels
from sagellm.backends.cpu.torch_linear import array, tensor
from sagellm.backends.step import StepInputs
from sagellm.graphs.kernels.memory_layout import SCALE_BYTES
from sagellm.graphs.kernels.token_mixers import LinearAttention, PagedAttention

_CHUNK = 64  # query rows at a time, so that their scores fit in the CPU's cache

T = TypeVar("T")


class ForwardContext:
    """The inputs and the pool of one step as tensors, and values that all layers share (`once`).

    A context lives for one `run` of a program.
    """

    def __init__(self, inputs: StepInputs, pool: Array) -> None:
        self.inputs = inputs
        self.pool = tensor(pool)
        self.positions = tensor(inputs.positions)
        self.query_starts = tensor(inputs.query_starts)
        self.states = tensor(inputs.states)
        self._block_tables, self._slots = tensor(inputs.block_tables), tensor(inputs.slots)
        self._kept: dict[object, object] = {}

    def once(self, key: object, make: Callable[[], T]) -> T:
        """Call `make()` on the first call with `key`, and return the same value on later calls."""
        if key not in self._kept:
            self._kept[key] = make()
        return cast(T, self._kept[key])

    @property
    def row_sequences(self) -> torch.Tensor:
        """The index of each row's sequence: [T] int64."""
        return self.once("row_sequences", self._row_sequences)

    def _row_sequences(self) -> torch.Tensor:
        starts = self.query_starts
        return torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())

    def tables(self, table: int) -> torch.Tensor:
        """The block tables number `table`, one per sequence: [B, M] int32."""
        count = len(self.inputs.context_lens)
        return self._block_tables[table * count : (table + 1) * count]

    def slots(self, table: int) -> torch.Tensor:
        """The slot of each row's key and value in the blocks of table number `table`: [T] int64."""
        count = len(self.inputs.token_ids)
        return self._slots[table * count : (table + 1) * count]

    @property
    def longest_context(self) -> int:
        """The number of tokens of the longest sequence; every position of the step is smaller."""
        return max(self.inputs.contexts)


# Maps q [T, heads * head_dim] to the result, of the same shape, over the step's pool.
Attention: TypeAlias = Callable[[ForwardContext, torch.Tensor], torch.Tensor]


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
    found = kernels.attention(
        array(q),
        pool=array(step.pool),
        layer=options.layer,
        block_tables=array(step.tables(options.table)),
        query_starts=step.inputs.query_starts,
        context_lens=step.inputs.context_lens,
        scale=options.scale,
        window=options.window,
        threads=torch.get_num_threads(),
        tiles=tiles,
    )
    return torch.from_numpy(found)


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
    contexts = (step.positions + 1).tolist()
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
    at = step.positions[rows, None]
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
    picked = dequantised(picked) if picked.dtype == torch.int8 else picked
    return picked.flatten(2, 3).float()


def quantised(rows: torch.Tensor) -> torch.Tensor:
    """Quantise keys or values [..., head_dim] as codes.h does: [..., head_dim + SCALE_BYTES] int8.

    A row with a number that is not finite gets the scale NaN.
    """
    none = (rows * 0).sum(-1, keepdim=True)  # 0 or NaN
    largest = rows.abs().amax(-1, keepdim=True) + none
    # Smaller numbers, for which the inverse would overflow, become 0.
    scales = torch.where(largest > 1e-30, largest / 127.0, none).bfloat16()
    inverse = torch.where(scales > 0, 1.0 / scales.float(), 0.0)
    codes = (rows * inverse).round().nan_to_num(0.0).to(torch.int8)
    return torch.cat([codes, scales.view(torch.int8)], -1)


def dequantised(rows: torch.Tensor) -> torch.Tensor:
    """Keys or values [..., head_dim] float32 of rows that `quantised` made."""
    codes, scales = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:].contiguous()
    return codes * scales.view(torch.bfloat16).float()


_TOKENS = 64  # tokens of linear attention that are multiplied at once

# For T new tokens of one sequence: takes q, k, v [T, heads, size], gate [T, heads] and the state
# before the tokens; returns the result [T, heads, value_dim] and the state after the tokens.
Recurrence: TypeAlias = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def linear_attention(
    options: LinearAttention, binding: Binding
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Make the kernel, which reads each sequence's state and writes the state after the step."""
    # Products of chunks round differently from single tokens, and a prompt may be cut anywhere.
    recurrence = token_by_token if binding.deterministic else in_chunks

    def run(step: ForwardContext, *inlets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, gate = (rows.view(len(rows), options.num_heads, -1) for rows in inlets[:4])
        read, written = step.states
        parts = slice(options.first_block, options.first_block + options.num_blocks)
        out, start = torch.empty_like(v), 0
        for sequence, num_rows in enumerate(step.inputs.query_lens):
            rows = slice(start, start + num_rows)
            state = load(options, step.pool, read[sequence, parts])
            given = q[rows] * options.scale, k[rows], v[rows], gate[rows, :, 0]
            out[rows], state = recurrence(*given, state)
            store(options, step.pool, written[sequence, parts], state)
            start += num_rows
        return (out.flatten(1),)

    return run


def load(options: LinearAttention, pool: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Read a state from its blocks: [heads, key_dim, value_dim] float32; zeros if they are -1."""
    shape = options.num_heads, options.key_dim, options.value_dim
    if int(blocks[0]) < 0:
        return torch.zeros(shape)
    pages = pool[options.layer][:, blocks.long()]
    return (
        pages.reshape(-1).view(torch.uint8)[: options.state_bytes].view(torch.float32).view(shape)
    )


def store(
    options: LinearAttention, pool: torch.Tensor, blocks: torch.Tensor, state: torch.Tensor
) -> None:
    """Write the float32 bytes of a state to its blocks, whatever the dtype of the pool."""
    pages = pool[options.layer][:, blocks.long()]
    flat = pages.reshape(-1)
    flat.view(torch.uint8)[: options.state_bytes] = state.reshape(-1).view(torch.uint8)
    pool[options.layer][:, blocks.long()] = flat.view(pages.shape)


def token_by_token(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Recurrence by its definition. No shape or bit depends on the number of tokens."""
    out = torch.empty_like(v)
    for token in range(len(q)):
        added = k[token, :, :, None] * v[token, :, None, :]
        state = state * torch.sigmoid(gate[token])[:, None, None] + added
        out[token] = (q[token, :, :, None] * state).sum(1)
    return out, state


def in_chunks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Recurrence by products of whole chunks (Yang et al. 2023, arXiv:2312.06635)."""
    chunks = []
    for top in range(0, len(q), _TOKENS):
        rows = slice(top, top + _TOKENS)
        out, state = _tokens_chunk(q[rows], k[rows], v[rows], gate[rows], state)
        chunks.append(out)
    return torch.cat(chunks), state


def _tokens_chunk(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Recurrence for one chunk.

    The decay between two tokens is computed as the exponential of a difference of logs: it is at
    most 1, so it cannot overflow.
    """
    q, k, v = (rows.transpose(0, 1) for rows in (q, k, v))  # heads first
    since = F.logsigmoid(gate).cumsum(0).T[:, :, None]  # [heads, T, 1]: log of the decay so far
    kept = (since - since.transpose(1, 2)).tril().exp().tril()
    out = (q @ k.transpose(1, 2) * kept) @ v + (q * since.exp()) @ state
    last = since[:, -1:]
    state = state * last.exp() + (k * (last - since).exp()).transpose(1, 2) @ v
    return out.transpose(0, 1), state
