"""The cells of each model, and which cells are left out because of their cost."""

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.cells import Cell
from benchmarks.machine import Limits
from benchmarks.shape import LLAMA15M, QWEN05, QWEN05_2L, Shape

FILL_SHARES = 2  # prefilling a long context may take this multiple of a cell's time
START = Cell("start-up", "start", 1, 128, 1)
MEMORY = Cell("peak-memory", "memory", 1, 128, 1)
ERROR = Cell("logit-error", "error", 1, 256, 1)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and its cells. `is_long`: only for engines that read long contexts."""

    shape: Shape
    cells: tuple[Cell, ...]
    is_long: bool = False

    @property
    def max_len(self) -> int:
        return max(cell.prompt_len + cell.num_out for cell in self.cells) + 8

    @property
    def max_seqs(self) -> int:
        return max(cell.num_sequences for cell in self.cells)

    @property
    def max_tokens(self) -> int:
        """The tokens that the KV cache must hold at once."""
        return max(cell.num_sequences * (cell.prompt_len + cell.num_out + 8) for cell in self.cells)


def subjects(num_out: int) -> dict[str, Subject]:
    """Subjects by model name. Decode and batch cells generate `num_out` tokens a sequence."""
    decode = Cell("decode-1", "decode", 1, 128, num_out)
    batch = Cell("batch-32", "batch", 32, 128, num_out)
    whole = (
        START,
        Cell("prefill-512", "prefill", 1, 512, 1),
        Cell("prefill-2048", "prefill", 1, 2048, 1),
        Cell("ttft-128", "ttft", 1, 128, 1),
        decode,
        Cell("batch-16", "batch", 16, 128, num_out),
        batch,
        MEMORY,
        ERROR,
    )
    few = min(num_out, 32)
    long = tuple(
        Cell(f"decode-{length >> 10}k-{num}", "decode", num, length, few)
        for length in (8192, 32768)
        for num in (1, 8)
    )
    return {
        QWEN05.name: Subject(QWEN05, whole),
        LLAMA15M.name: Subject(LLAMA15M, (START, decode, batch, MEMORY, ERROR)),
        QWEN05_2L.name: Subject(QWEN05_2L, long, is_long=True),
    }


def weights_and_kv(shape: Shape, bytes_a_weight: float, cells: Iterable[Cell]) -> float:
    """Bytes of the weights, and of the keys and values of the largest of the `cells`.

    Keys and values count in bfloat16, norms and biases not at all.
    """
    tokens = max(cell.num_sequences * (cell.prompt_len + cell.num_out) for cell in cells)
    return shape.num_weights * bytes_a_weight + tokens * shape.kv_bytes_a_token


def too_long(cell: Cell, shape: Shape, limits: Limits, spend_s: float) -> str | None:
    """The reason to leave a cell out because of its prefill; None for a cell to measure."""
    flops = cell.num_sequences * shape.prefill_flops(cell.prompt_len)
    fill_s = flops / max(limits.fp32_flops_per_s, limits.bf16_flops_per_s)
    if fill_s <= FILL_SHARES * spend_s:
        return None
    least_s = -(-fill_s // FILL_SHARES)
    return f"left out: its prefill takes {fill_s:.0f} s at best; --spend-s {least_s:.0f} allows it"
