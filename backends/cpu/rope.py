"""Rotary angles, and the torch definition of the rotation."""

import math
from functools import cache

import torch

from sagellm.graphs.kernels.attention import Rope

_FEWEST = 256  # positions of the first table


class RopeTables:
    """Cosines and sines by position: [positions, 2, head_dim / 2] float32, grown by doubling.

    Angles are float32 products, as in transformers, so that far positions agree with it.
    """

    def __init__(self, options: Rope) -> None:
        self._frequencies = frequencies(options)
        self._tables = self._made(_FEWEST)

    def up_to(self, num_positions: int) -> torch.Tensor:
        """Tables that hold at least so many positions."""
        tables = self._tables  # engines on other threads may put shorter ones there meanwhile
        if num_positions > len(tables):
            tables = self._tables = self._made(1 << (num_positions - 1).bit_length())
        return tables

    def _made(self, num_positions: int) -> torch.Tensor:
        places = torch.arange(num_positions, dtype=torch.float32)
        angles = torch.outer(places, self._frequencies)
        return torch.stack([angles.cos(), angles.sin()], 1)


@cache
def rope_tables(options: Rope) -> RopeTables:
    """One set of tables for all layers and programs that rotate alike."""
    return RopeTables(options)


def frequencies(options: Rope) -> torch.Tensor:
    """[head_dim / 2] radians a position, scaled."""
    steps = torch.arange(0, options.head_dim, 2, dtype=torch.int64).float() / options.head_dim
    plain = 1.0 / options.theta**steps
    if options.scaling == "linear":
        return plain / options.factor
    return _llama3(plain, options) if options.scaling == "llama3" else plain


def _llama3(plain: torch.Tensor, options: Rope) -> torch.Tensor:
    """Long waves are stretched, short ones kept, those between blended (Llama 3.1 release)."""
    turns = options.original_max_len / (2 * math.pi / plain)  # within the original context
    low, high = options.low_freq_factor, options.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * plain / options.factor + kept * plain


def rotated(rows: torch.Tensor, tables: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Every head of rows [T, heads * head_dim], halves (a, b) -> (a cos - b sin, b cos + a sin)."""
    cosine, sine = tables[positions][:, None].unbind(2)  # [T, 1, head_dim / 2]
    first, second = rows.reshape(len(rows), -1, 2, tables.shape[2]).unbind(2)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.stack(turned, 2).flatten(1)
