"""Would another order be better? First a shadow of it, then an A/B test, on simulated traffic.

The graph is experiment.yaml. `sagellm replay` and `sagellm ab` print the same from its log.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from sagellm.experiments.arms import compare_arms, read_arms
from sagellm.experiments.confidence import ABTest
from sagellm.experiments.disagreements import shadow_report
from sagellm.graphs.text.yaml import load_file
from sagellm.load.synthetic import parse_synthetic
from sagellm.opening.decisions import DecisionFile
from sagellm.simulation.simulation_run import SimulationPoint, simulate

GRAPH = Path(__file__).with_name("experiment.yaml")
LOAD = "synthetic:rate=26,requests=4000,input=lognormal:600:1,output=exponential:80"


def experiment(log: Path) -> None:
    workload = list(parse_synthetic(LOAD).generate())
    simulate(SimulationPoint(load_file(GRAPH), workload, decisions=DecisionFile(log)))
    for node in shadow_report(log, {}).nodes:
        for tally in node.tallies:
            share = f"{tally.num_notes} of {node.num_decisions} decisions"
            print(f"shadow of {node.node}: {tally.label}: {share}, {tally.outcomes}")
    for one in compare_arms(read_arms(log), ABTest(), block_s=4.0):
        difference = one.found.difference * one.metric.scale
        print(f"{one.metric.title}: b - a = {difference:+.2f} {one.metric.unit}: {one.verdict}")


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        experiment(Path(folder) / "decisions.log")
