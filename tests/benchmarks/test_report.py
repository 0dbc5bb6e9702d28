import json
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell, Run
from benchmarks.machine import Limits
from benchmarks.report import measured, table, write

CELL = Cell("decode-1", "decode", 1, 128, 11)
LIMITS = Limits(read_bytes_per_s=20e9, fp32_flops_per_s=1e11, bf16_flops_per_s=2e10)
FAST, SLOW, CUT = Run(1.0, 2.0, 11), Run(1.0, 3.0, 11), Run(1.0, 6.0, 4)


def record(*cells: dict[str, Any]) -> dict[str, Any]:
    machine = {"cpu": "A", "cores": 2, "threads": 2, "capability": "AVX2", "torch": "2"}
    limits = {"read_gb_per_s": 20.0, "fp32_gflops": 100.0, "bf16_gflops": 20.0}
    named = {"date": "2026-01-01", "command": "sagellm bench engine"}
    return {**named, "machine": machine, "limits": limits, "cells": list(cells)}


def test_medians_and_ratios() -> None:
    found = measured(CELL, {"sagellm": [FAST, SLOW, FAST], "transformers": [SLOW]}, LIMITS)
    assert found["engines"]["sagellm"] == {"median": 10.0, "rounds": 3, "rates": [10, 5, 10]}
    assert found["ratio_to_transformers"] == 2.0
    assert found["share_of_limit"] == round(10 / (20e9 / 989.6e6), 3)


def test_what_was_extrapolated_is_said() -> None:
    found = measured(CELL, {"sagellm": [FAST], "transformers": [CUT]}, LIMITS)
    assert found["engines"]["transformers"]["extrapolated_from_tokens"] == 4
    assert "2.0*" in table(record(found))
    assert "* cut short" in table(record(found))


def test_the_table_has_a_row_a_cell() -> None:
    found = measured(CELL, {"sagellm": [FAST]}, LIMITS)
    assert "| decode-1 | 10.0 | - | - | 20.2 | 0.495 | 1 |" in table(record(found)).splitlines()


def test_both_files_hold_the_record(tmp_path: Path) -> None:
    kept = record(measured(CELL, {"sagellm": [FAST]}, LIMITS))
    as_json, as_table = write(kept, tmp_path / "new", "engine-a")
    assert json.loads(as_json.read_text()) == kept
    assert as_table.read_text() == table(kept)
