"""The graphs of published simulations run."""

from pathlib import Path

import pytest

from sagellm.graphs.text.yaml import load_file
from sagellm.load.synthetic import parse_synthetic
from sagellm.simulation.simulation_run import SimulationPoint, simulate

FOLDER = Path(__file__).parents[2] / "benchmarks" / "simulation"
LOAD = "synthetic:rate=20,requests=40,input=lognormal:2000:0.8,output=exponential:50"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_graph_serves_all_requests(file):
    run = simulate(SimulationPoint(load_file(file), list(parse_synthetic(LOAD).generate())))
    assert {request.end for request in run.requests} == {"length"}
