from pathlib import Path

import pytest

from benchmarks.cells import Cell
from benchmarks.machine import Limits
from benchmarks.shape import QWEN05
from benchmarks.size import blank, draw, left_out, table

LIMITS = Limits(read_bytes_per_s=20e9, fp32_flops_per_s=1e11, bf16_flops_per_s=2e10)
RECORD = {
    "model": "m",
    "row": "bf16",
    "machine": {"cpu": "A"},
    "cells": [
        {"batch": 1, "context": 128, "tokens_per_s": 10.0},
        {"batch": 2, "context": 128, "tokens_per_s": 18.0},
        {"batch": 1, "context": 2048, "tokens_per_s": 8.5},
    ],
    "left_out": {"2 x 2048": "its prefill takes 90 s at best"},
}


@pytest.mark.parametrize(
    ("batch", "context", "free_bytes", "why"),
    [
        (1, 128, 1 << 34, None),
        (64, 32768, 1 << 45, "its prefill takes"),
        (64, 32768, 1 << 30, "keys and values take 25.8 GB"),
        (1, 65536, 1 << 34, "the model ends at 32768"),
        (1, 16, 1 << 34, "no room for 32 tokens out"),
    ],
)
def test_why_a_cell_is_left_out(
    batch: int,
    context: int,
    free_bytes: int,
    why: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Memory:
        available = free_bytes

    monkeypatch.setattr("benchmarks.size.psutil.virtual_memory", Memory)
    found = left_out(Cell("c", "decode", batch, context - 32, 32), QWEN05, LIMITS, 60.0)
    assert (found is None) == (why is None)
    assert (why or "") in (found or "")


def test_the_table_has_a_row_a_batch_and_says_what_is_missing() -> None:
    lines = table(RECORD).splitlines()
    assert lines[0] == "| batch | 128 | 2,048 |"
    assert lines[2:4] == ["| 1 | 10 | 8.5 |", "| 2 | 18 | - |"]
    assert lines[-1] == "- 2 x 2048: its prefill takes 90 s at best"


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    draw(RECORD, blank(), tmp_path / "size.png")
    assert (tmp_path / "size.png").read_bytes().startswith(b"\x89PNG")
