"""Linear attention in torch, with the states of sequences in blocks of the KV pool."""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F

from sagellm.backends.cpu.binding import Binding, ForwardContext
from sagellm.graphs.kernels.token_mixers import LinearAttention

_CHUNK = 64  # tokens that are multiplied at once

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
        read, written = step.inputs.states
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
    for top in range(0, len(q), _CHUNK):
        rows = slice(top, top + _CHUNK)
        out, state = _chunk(q[rows], k[rows], v[rows], gate[rows], state)
        chunks.append(out)
    return torch.cat(chunks), state


def _chunk(
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
