"""The hardware limits of this machine, measured in the same run; and the name of the machine."""

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cells import Cell
from benchmarks.shape import BF16_BYTES, QWEN05, Shape

READ_BYTES = 1 << 29
NUM_TRIES = 5
SPEEDS = ("prefill", "ttft", "decode", "batch")


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates of this machine with the threads in use: bytes read and operations, each a second."""

    read_bytes_per_s: float
    fp32_flops_per_s: float
    bf16_flops_per_s: float

    def of(
        self, cell: Cell, shape: Shape = QWEN05, bytes_a_weight: float = BF16_BYTES
    ) -> float | None:
        """The bound for any engine with these weights, in the unit of the cell's kind.

        None if arithmetic bounds the cell and weights are not bfloat16: that speed is not measured.
        """
        if cell.kind not in SPEEDS:
            return None
        prefill_s = cell.num_sequences * shape.prefill_flops(cell.prompt_len) / self._flops_per_s
        if cell.kind == "decode":
            middle = cell.prompt_len + cell.num_out // 2
            step_s = self.step_s(shape, cell.num_sequences, middle, bytes_a_weight)
            return cell.num_sequences / step_s
        if bytes_a_weight != BF16_BYTES:
            return None
        if cell.kind == "prefill":
            return cell.num_sequences * cell.prompt_len / prefill_s
        if cell.kind == "ttft":
            return 1e3 * prefill_s
        lengths = range(cell.prompt_len + 1, cell.prompt_len + cell.num_out)
        steps_s = sum(self.step_s(shape, cell.num_sequences, length) for length in lengths)
        return cell.num_sequences * cell.num_out / (prefill_s + steps_s)

    def step_s(
        self,
        shape: Shape,
        num_sequences: int,
        context_len: int,
        bytes_a_weight: float = BF16_BYTES,
    ) -> float:
        """The least time of a decode step: the larger of reading and arithmetic.

        Weights, keys and values are read. Arithmetic counts for bfloat16 weights only.
        """
        cached = num_sequences * context_len * shape.kv_bytes_a_token
        read_s = (shape.num_weights * bytes_a_weight + cached) / self.read_bytes_per_s
        if bytes_a_weight != BF16_BYTES:
            return read_s
        flops = num_sequences * shape.decode_flops(context_len)
        return max(read_s, flops / self._flops_per_s)

    @property
    def _flops_per_s(self) -> float:
        return max(self.fp32_flops_per_s, self.bf16_flops_per_s)


def measure_limits() -> Limits:
    """Read and multiply for a few seconds; the best of several tries counts."""
    return Limits(
        read_bytes_per_s=Bandwidth().measure(),
        fp32_flops_per_s=_matmul_flops(torch.float32),
        bf16_flops_per_s=_matmul_flops(torch.bfloat16),
    )


class Bandwidth:
    """Measures the read bandwidth of memory. All measurements share one buffer."""

    def __init__(self) -> None:
        self._buffer = torch.ones(READ_BYTES // 4)

    def measure(self) -> float:
        """The bandwidth in bytes a second."""
        return READ_BYTES / _best(self._buffer.sum)


def _matmul_flops(dtype: torch.dtype) -> float:
    """The rate of 512 rows through the widest linear of the model, in operations a second."""
    hidden, intermediate = QWEN05.hidden, QWEN05.intermediate
    rows, weight = torch.randn(512, hidden).to(dtype), torch.randn(intermediate, hidden).to(dtype)
    num_operations = 2 * 512 * hidden * intermediate
    return num_operations / _best(lambda: torch.nn.functional.linear(rows, weight))


def _best(work: Callable[[], object]) -> float:
    """The seconds of the fastest try."""
    taken = []
    for _ in range(NUM_TRIES):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def describe() -> dict[str, object]:
    """The machine and its software, without names of users or folders."""
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
