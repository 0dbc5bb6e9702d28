"""Kernels over whole sequences that lie one after another, on torch tensors: attention and pooling.

No row is padded: sequences of the same length are attended to together, the others one by one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from sagellm.backends.cpu.attention import ForwardContext
from sagellm.backends.cpu.binding import Binding
from sagellm.graphs.kernels.token_mixers import PackedAttention, PoolRows

_Kernel = Callable[..., tuple[torch.Tensor, ...]]


def packed_attention(options: PackedAttention, binding: Binding) -> _Kernel:
    """softmax(scale * q k) v, with q [T, heads * head_dim] and k and v [T, KV heads * head_dim]."""

    def run(step: ForwardContext, *inlets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, _ = inlets
        out = torch.empty_like(q)
        groups = step.once("lengths", lambda: _runs(step.inputs.query_lens))
        for start, count, length in groups:
            rows = slice(start, start + count * length)
            out[rows] = _attended(options, q[rows], k[rows], v[rows], count)
        return (out,)

    return run


def _runs(lengths: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """(first row, number of sequences, length) of each run of sequences of one length."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    for length in lengths:
        if runs and runs[-1][2] == length:
            first, count, _ = runs[-1]
            runs[-1] = first, count + 1, length
        else:
            runs.append((start, 1, length))
        start += length
    return tuple(runs)


def _attended(
    options: PackedAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int
) -> torch.Tensor:
    """Attention in `count` sequences of one length; rows [count * length, heads * head_dim]."""
    q = _heads(q, count, options.num_heads)
    k, v = (_heads(rows, count, options.num_kv_heads) for rows in (k, v))
    is_causal = options.causal and options.window is None
    mixed = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if options.window is None else _window_mask(q.shape[2], options.window),
        is_causal=is_causal,
        scale=options.scale,
        enable_gqa=options.num_heads != options.num_kv_heads,
    )
    return mixed.transpose(1, 2).reshape(len(mixed) * mixed.shape[2], -1)


def _heads(rows: torch.Tensor, count: int, num_heads: int) -> torch.Tensor:
    """[count, heads, length, head_dim], a view of the rows."""
    return rows.view(count, len(rows) // count, num_heads, -1).transpose(1, 2)


def _window_mask(length: int, window: int) -> torch.Tensor:
    """Whether each of `length` rows attends to each other one: itself and `window` - 1 earlier."""
    behind = torch.arange(length)[:, None] - torch.arange(length)
    return (behind >= 0) & (behind < window)


def pool(options: PoolRows, binding: Binding) -> _Kernel:
    """One row [B, size] of each sequence."""

    def run(step: ForwardContext, *inlets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows, starts = inlets
        if options.mode == "cls":
            return (rows[starts[:-1]],)
        if options.mode == "last":
            return (rows[starts[1:] - 1],)
        return (torch.segment_reduce(rows, "mean", offsets=starts),)

    return run
