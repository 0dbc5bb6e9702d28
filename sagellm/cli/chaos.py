"""`sagellm chaos run`: runs scenarios of faults, and checks the graph's results in each."""

import logging
import sys
from dataclasses import asdict
from pathlib import Path

import msgspec
import trio

from sagellm.chaos.scenario import ScenarioError, load_scenario
from sagellm.chaos.scenario_run import ScenarioReport, run_scenario
from sagellm.cli.errors import FAILED, Failure
from sagellm.cli.graph_argument import warn_shadowed_graph
from sagellm.logs import process_logs


def run(*scenarios: Path, seed: int = 0, decisions: Path | None = None, json: bool = False) -> int:
    """Run scenarios, one after the other: the graph as worker processes, and what happens to it.

    Every stream must give the tokens that it gives in one process without faults, unless the
    scenario's checks say otherwise. Exit code 1 where a check fails.

    Parameters
    ----------
    scenarios
        YAML files; examples/chaos has some.
    seed
        Of which bits are flipped, where any are.
    decisions
        A folder for a log of what each scenario's graph decided, NAME.decisions, which
        `sagellm replay` reads.
    json
        Print one JSON object a scenario.
    """
    if not scenarios:
        raise Failure("no scenario is given", "name a YAML file, such as examples/chaos/kill.yaml")
    reports = [_run(path, seed, decisions, json) for path in scenarios]
    return 0 if all(report.is_passed for report in reports) else FAILED


def _run(path: Path, seed: int, decisions: Path | None, json: bool) -> ScenarioReport:
    log = None
    if decisions is not None:
        decisions.mkdir(parents=True, exist_ok=True)
        log = decisions / f"{path.stem}.decisions"
    try:
        loaded = load_scenario(path)
        warn_shadowed_graph(loaded.scenario.graph, path.parent, "beside the scenario")
        with process_logs(logging.WARNING):  # a failed write of a log does not end the scenario
            report = trio.run(run_scenario, loaded, seed, log)
    except* ScenarioError as group:  # nurseries wrap the errors of their tasks in groups
        raise Failure(_first(group), "docs/operations.md has what a scenario may say") from None
    if json:
        print(msgspec.json.encode(asdict(report)).decode())
    else:
        print(f"{'passed' if report.is_passed else 'FAILED'}: {report.name}")
        figures = (f"{name} {value:g}" for name, value in report.figures().items())
        print(f"  {', '.join(figures)}")
        for failed in report.failed:
            print(f"  {failed}", file=sys.stderr)
    return report


def _first(group: BaseExceptionGroup[ScenarioError]) -> str:
    """The message of the first error in a nested exception group."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else str(first)
