"""What the machine could do at best, measured in the same run; and what machine it is."""

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cells import Cell
from benchmarks.shape import BYTES_A_TOKEN, HIDDEN, INTERMEDIATE, prefill_flops

READ_BYTES = 1 << 29
NUM_TRIES = 5


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates of this machine with the threads in use: bytes a second read, operations a second."""

    read_bytes_per_s: float
    fp32_flops_per_s: float
    bf16_flops_per_s: float

    def of(self, cell: Cell) -> float | None:
        """Tokens a second that no engine can pass with these weights; None for a batch."""
        if cell.kind == "decode":
            return self.read_bytes_per_s / BYTES_A_TOKEN
        if cell.kind == "prefill":
            fastest = max(self.fp32_flops_per_s, self.bf16_flops_per_s)
            return cell.prompt_len / (prefill_flops(cell.prompt_len) / fastest)
        return None


def measure_limits() -> Limits:
    """A few seconds of reading and multiplying; the best of several tries each."""
    buffer = torch.ones(READ_BYTES // 4)
    return Limits(
        read_bytes_per_s=READ_BYTES / _best(buffer.sum),
        fp32_flops_per_s=_matmul_flops(torch.float32),
        bf16_flops_per_s=_matmul_flops(torch.bfloat16),
    )


def _matmul_flops(dtype: torch.dtype) -> float:
    """512 rows through the widest linear of the model."""
    rows, weight = torch.randn(512, HIDDEN).to(dtype), torch.randn(INTERMEDIATE, HIDDEN).to(dtype)
    num_operations = 2 * 512 * HIDDEN * INTERMEDIATE
    return num_operations / _best(lambda: torch.nn.functional.linear(rows, weight))


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest try."""
    taken = []
    for _ in range(NUM_TRIES):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def describe() -> dict[str, object]:
    """The machine and what computes on it; nothing that names its owner or its folders."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    text = listing.read_text() if listing.exists() else ""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    named = fields.get("model name", platform.processor() or platform.machine())
    family = f" family {fields['cpu family']}" if "cpu family" in fields else ""
    return f"{named}{family}"
