"""The simulator meets what was measured: the committed ground truth, simulated again."""

import pytest

from benchmarks.simulation_truth import TRUTH, compared, read_truth

PROFILE = "epyc-zen5-llama15m"
CELLS = {" ".join(map(str, cell.key)): cell for cell in read_truth(TRUTH).cells}
# Cells of one engine below saturation. docs/simulation.md says why others are missed.
MET = [name for name in CELLS if name.startswith("joint") and name != "joint azure 0.9"]


def test_the_truth_has_every_cell():
    assert len(CELLS) == 3 * 2 * 3


@pytest.mark.parametrize("name", MET)
def test_a_simulation_meets_the_measured_engine(name):
    found = compared(CELLS[name], PROFILE, 1)["errors"]
    assert abs(found["ttft_p50_ms"]) < 0.10
    assert abs(found["e2e_p50_ms"]) < 0.10
    assert abs(found["ttft_p99_ms"]) < 0.20
    assert abs(found["e2e_p99_ms"]) < 0.20
    assert abs(found["throughput_rps"]) < 0.05
    assert found["each_ttft"] < 0.15
