"""The graphs of published simulations run."""

from pathlib import Path

import pytest

from sagellm.graphs.text.yaml import load_file
from sagellm.load.synthetic import parse_synthetic
from sagellm.simulation.simulation_run import SimulationPoint, simulate

FOLDER = Path(__file__).parents[2] / "benchmarks" / "simulation"
LOAD = "synthetic:rate={},requests=40,input=lognormal:2000:0.8,output=exponential:50"
RATES = {"long_prefill": 2}  # requests a second; its admission refuses what would decode too slowly


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_graph_serves_all_requests(file):
    load = LOAD.format(RATES.get(file.stem, 20))
    run = simulate(SimulationPoint(load_file(file), list(parse_synthetic(load).generate())))
    assert {request.end for request in run.requests} == {"length"}
