"""Attention in C against its torch definition: batches, chunks and threads change no bit."""

import itertools
import platform
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tile_kernels import WAYS, kernels_by

from sagellm.backends.cpu.attention import ForwardContext, attend_row_by_row, quantised
from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.cpu.torch_linear import array
from sagellm.backends.step import StepInputs
from sagellm.graphs.kernels.token_mixers import PagedAttention

KERNELS = native_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no C compiler on this machine")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
WINDOWS = pytest.mark.parametrize("window", [None, 1, 70, 700])
NONE = np.empty(0, dtype=np.int64)


@dataclass
class Case:
    """A pool of three sequences, and the queries of all their positions."""

    pool: torch.Tensor
    queries: list[torch.Tensor]
    blocks: list[list[int]]
    options: PagedAttention

    def inputs(self, rows):
        """Steps on `rows`: (sequence, first position, end position)."""
        starts = [0, *itertools.accumulate(last - first for _, first, last in rows)]
        longest = max(len(self.blocks[sequence]) for sequence, *_ in rows)
        tables = [self.blocks[s] + [0] * (longest - len(self.blocks[s])) for s, *_ in rows]
        return StepInputs(
            token_ids=NONE,
            positions=np.concatenate([np.arange(first, last) for _, first, last in rows]),
            slots=NONE,
            query_starts=np.array(starts),
            context_lens=np.array([last for *_, last in rows]),
            block_tables=np.array(tables, dtype=np.int32),
            logit_rows=NONE,
            states=NONE,
            query_lens=tuple(last - first for _, first, last in rows),
            contexts=tuple(last for *_, last in rows),
        )

    def run(self, rows, threads=1, kernels=KERNELS, tiles=False):
        """Results of the C kernel, one tensor an entry of `rows`."""
        q, inputs = self._queries(rows), self.inputs(rows)
        found = kernels.attention(
            array(q),
            pool=array(self.pool),
            layer=1,
            block_tables=inputs.block_tables,
            query_starts=inputs.query_starts,
            context_lens=inputs.context_lens,
            scale=self.options.scale,
            window=self.options.window,
            threads=threads,
            tiles=tiles,
        )
        return torch.from_numpy(found).split(list(inputs.query_lens))

    @property
    def is_rounded(self):
        """Whether queries and softmax weights are rounded: attention multiplies bfloat16 pairs."""
        is_even = self.options.head_dim % 2 == 0
        has_pairs = KERNELS.has_pairs and platform.machine() not in ("aarch64", "arm64")
        return self.pool.dtype != torch.float32 and is_even and has_pairs

    def wanted(self, rows):
        inputs, q = self.inputs(rows), self._queries(rows)
        if self.is_rounded:
            q = (q * self.options.scale).bfloat16().float() / self.options.scale
        found = attend_row_by_row(self.options, ForwardContext(inputs, array(self.pool)), q)
        return found.split(list(inputs.query_lens))

    def _queries(self, rows):
        return torch.cat([self.queries[s][first:last] for s, first, last in rows])


def case(lens=(1200, 90, 7), heads=6, kv_heads=2, head_dim=16, block_size=16, **options):
    torch.manual_seed(4)
    dtype, window = options.get("dtype", torch.float32), options.get("window")
    counts = [-(-length // block_size) for length in lens]
    order = iter((torch.randperm(sum(counts)) + 1).tolist())
    blocks = [list(itertools.islice(order, count)) for count in counts]
    pool = torch.full((2, 2, sum(counts) + 1, kv_heads, block_size, head_dim), torch.nan)
    for length, mine in zip(lens, blocks, strict=True):
        for index, block in enumerate(mine):
            used = min(block_size, length - index * block_size)
            pool[1, :, block, :, :used] = torch.randn(2, kv_heads, used, head_dim)
    queries = [2 * torch.randn(length, heads * head_dim) for length in lens]
    attention = PagedAttention(1, heads, kv_heads, head_dim, head_dim**-0.5, window)
    pool = quantised(pool) if dtype == torch.int8 else pool.to(dtype)
    return Case(pool, queries, blocks, attention)


DECODE = [(0, 1199, 1200), (1, 89, 90), (2, 6, 7), (1, 0, 1), (0, 511, 512), (0, 512, 513)]
RAGGED = [(0, 450, 600), (2, 0, 7), (1, 60, 90), (0, 1190, 1200)]


@DTYPES
@WINDOWS
@pytest.mark.parametrize("rows", [DECODE, RAGGED], ids=["decode", "ragged"])
def test_it_agrees_with_torch(rows, window, dtype):
    batch = case(window=window, dtype=dtype)
    for found, wanted in zip(batch.run(rows), batch.wanted(rows), strict=True):
        assert torch.allclose(found, wanted, atol=4e-3 if batch.is_rounded else 2e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(1, 1, 8, 1), (5, 5, 24, 3), (14, 2, 64, 32), (9, 1, 10, 16), (70, 1, 7, 5), (8, 4, 128, 128)],
)
@DTYPES
def test_any_shape_of_heads_and_blocks(heads, kv_heads, head_dim, block_size, dtype):
    batch = case((150, 40), heads, kv_heads, head_dim, block_size, dtype=dtype)
    rows = [(0, 149, 150), (1, 3, 40), (0, 0, 100)]
    for found, wanted in zip(batch.run(rows), batch.wanted(rows), strict=True):
        assert torch.allclose(found, wanted, atol=4e-3 if batch.is_rounded else 2e-5)


@DTYPES
@WINDOWS
def test_a_row_has_the_same_bits_in_a_prompt_in_a_chunk_and_alone(window, dtype):
    batch = case(window=window, dtype=dtype)
    (whole,) = batch.run([(0, 0, 1200)])
    chunks = [batch.run([(2, 0, 7), (0, at, at + 150)])[1] for at in range(0, 1200, 150)]
    assert torch.equal(torch.cat(chunks), whole)
    for position in (0, 63, 64, 511, 512, 1023, 1024, 1199):
        rows = [(0, position, position + 1)]
        assert torch.equal(batch.run(rows)[0], whole[position : position + 1])
        assert torch.equal(batch.run([*DECODE, *rows])[-1], whole[position : position + 1])


@pytest.mark.parametrize("threads", [1, 2, 5, 16])
@DTYPES
def test_no_number_of_threads_changes_a_bit(threads, dtype):
    batch = case(dtype=dtype)
    wanted = batch.run(DECODE + RAGGED, 2)
    for _ in range(5):
        assert all(map(torch.equal, batch.run(DECODE + RAGGED, threads), wanted))


def test_a_batch_that_is_too_large_to_share_contexts_has_the_same_bits():
    """The sums of all spans would take 67 MiB."""
    batch = case((1200,), heads=64, kv_heads=1, head_dim=128)
    (alone,) = batch.run([(0, 1199, 1200)])
    assert all(torch.equal(found, alone) for found in batch.run([(0, 1199, 1200)] * 700))


@pytest.fixture(params=WAYS)
def tiles(request):
    """tiles(case, rows) -> what the case gives by tiles."""
    kernels = kernels_by(request.param)
    if not kernels.has_pairs:
        pytest.skip("a CPU that multiplies no pairs of bfloat16")
    return lambda batch, rows, threads=1: batch.run(rows, threads, kernels, tiles=True)


TILED = [(0, 1190, 1200), (0, 450, 600), (2, 0, 7), (1, 60, 90), (0, 511, 513)]


@WINDOWS
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(14, 2, 64, 32), (8, 4, 128, 16), (9, 9, 32, 3), (40, 2, 96, 128), (130, 1, 32, 16)],
)
def test_tiles_agree_with_torch(tiles, window, heads, kv_heads, head_dim, block_size):
    lens = (1200, 90, 7)
    batch = case(lens, heads, kv_heads, head_dim, block_size, dtype=torch.bfloat16, window=window)
    results = zip(tiles(batch, TILED), batch.run(TILED), batch.wanted(TILED), strict=True)
    for found, vectors, wanted in results:
        assert (found - wanted).abs().max() < (vectors - wanted).abs().max() + 1e-4


def test_tiles_are_no_further_from_exact_results_than_vectors(tiles):
    batch = case((900, 90, 7), 14, 2, 64, dtype=torch.bfloat16)
    rows = [(0, 0, 900)]
    (found,), (vectors,), (wanted,) = tiles(batch, rows), batch.run(rows), batch.wanted(rows)
    assert not torch.equal(found, vectors)
    assert (found - wanted).abs().mean() < 1.01 * (vectors - wanted).abs().mean()


@pytest.mark.parametrize("head_dim", [10, 16, 80])
def test_heads_that_fill_no_tile_are_multiplied_by_vectors(tiles, head_dim):
    batch = case(head_dim=head_dim, dtype=torch.bfloat16)
    assert all(map(torch.equal, tiles(batch, TILED), batch.run(TILED)))


def test_few_rows_are_multiplied_by_vectors(tiles):
    batch = case(heads=16, head_dim=32, dtype=torch.bfloat16)  # 8 rows a token
    assert all(map(torch.equal, tiles(batch, DECODE), batch.run(DECODE)))
    (found,), (vectors,) = tiles(batch, [(0, 80, 82)]), batch.run([(0, 80, 82)])
    assert not torch.equal(found, vectors)


def test_a_row_by_tiles_has_the_same_bits_in_any_batch_and_on_any_threads(tiles):
    batch = case(heads=14, head_dim=64, dtype=torch.bfloat16)
    (whole,) = tiles(batch, [(0, 0, 1200)])
    chunks = [tiles(batch, [(2, 0, 7), (0, at, at + 150)])[1] for at in range(0, 1200, 150)]
    assert torch.equal(torch.cat(chunks), whole)
    for threads in (1, 2, 5):
        found = tiles(batch, [*TILED, (0, 1195, 1200)], threads)
        assert torch.equal(found[-1], whole[1195:])
