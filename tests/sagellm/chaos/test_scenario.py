"""The format of scenarios. A wrong scenario is refused with its fix."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from sagellm.chaos.scenario import ScenarioError, load_scenario, metric_value, read_check
from sagellm.chaos.scenario_run import ScenarioReport
from sagellm.cli import main
from sagellm.gateway.metrics.snapshot import counter
from sagellm.opening.sources import graph_file

EXAMPLES = Path(__file__).parents[3] / "examples" / "chaos"
GOOD = """
sagellm_chaos: 1
name: x
graph: pd
events:
  - load: {streams: 2}
  - {after_tokens: 3, kill: "d[0]"}
"""
FIGURES = ScenarioReport("x").figures()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_make_sense(path: Path) -> None:
    loaded = load_scenario(path)
    assert loaded.scenario.checks
    for text in loaded.scenario.checks:
        read_check(text, FIGURES)


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("kill:", "kil:", "did you mean kill"),
        ("streams:", "stream:", "did you mean streams"),
        ('kill: "d[0]"', 'kill: "d[0]", stop: "d[0]"', "not kill and stop"),
        ('after_tokens: 3, kill: "d[0]"', "after_tokens: 3", "not nothing"),
        ("after_tokens: 3", "after_tokens: 3, at_s: 1", "not both"),
        ("after_tokens: 3", "after_tokens: 3, for_s: 1", "kill does not last"),
        ("after_tokens: 3", "after_tokens: three", "Expected `int"),
        ("  - load: {streams: 2}\n", "", "no load begins before"),
        (GOOD[GOOD.index("  - load") :], "  - {kill: x}\n", "no event is a load"),
        ("sagellm_chaos: 1", "sagellm_chaos: 2", "knows sagellm_chaos: 1"),
        ("name: x", "name: [x", "not closed|expected"),
        ("graph: pd\n", "", "missing required field `graph`"),
        ("graph: pd\n", "graph: ./pd.yaml\n", "no file beside it; did you mean pd"),
    ],
)
def test_what_makes_no_sense_is_refused(old: str, new: str, wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ScenarioError, match=wrong):
        load_scenario(path)


def test_a_graph_is_a_shipped_one_or_else_a_file_beside_the_scenario(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "scenarios"
    folder.mkdir()
    for name in ("pd.yaml", "pd", "own.yaml"):
        (folder / name).write_text("sagellm: 1")
    (tmp_path / "own.yaml").write_text("sagellm: 1")
    found = {}
    for name in ("pd", "pd.yaml", "own.yaml"):
        (folder / "x.yaml").write_text(GOOD.replace("graph: pd", f"graph: {name}"))
        found[name] = load_scenario(Path("scenarios/x.yaml")).graph.resolve()
    assert found == {
        "pd": graph_file("pd").resolve(),
        "pd.yaml": folder / "pd.yaml",
        "own.yaml": folder / "own.yaml",
    }


def test_the_file_that_a_shipped_name_does_not_mean_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def passed(*_: object) -> ScenarioReport:
        return ScenarioReport("x")

    monkeypatch.setattr("sagellm.cli.chaos.run_scenario", passed)
    (tmp_path / "pd.yaml").touch()
    (tmp_path / "x.yaml").write_text(GOOD)
    assert main(["chaos", "run", str(tmp_path / "x.yaml")]) == 0
    said = capsys.readouterr().err
    assert "pd means the shipped graph; write ./pd.yaml for the one beside the scenario" in said


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("identicl", "write `identical`"),
        ("num_unserve == 0", "did you mean num_unserved"),
        ("longest_gap_s < two", "write `identical`"),
        ("longest_gap_s =< 2", "write `identical`"),
        ('sagellm_engine_up{engine "d"} == 1', "labels are written"),
        ("__import__('os').system('x') == 0", "write `identical`"),
    ],
)
def test_checks_that_make_no_sense_are_refused(text: str, wrong: str) -> None:
    with pytest.raises(ScenarioError, match=wrong):
        read_check(text, FIGURES)


@pytest.mark.parametrize(
    ("text", "found", "holds"),
    [
        ("identical", 0, True),
        ("identical", 1, False),
        ("longest_gap_s < 2.5", 2.4, True),
        ("longest_gap_s < 2.5", 2.5, False),
        ("num_migrated != 0", 0, False),
        ("num_migrated >= 3", 3, True),
    ],
)
def test_a_check_compares(text: str, found: float, holds: bool) -> None:
    assert read_check(text, FIGURES).holds(found) == holds


def test_a_metric_is_the_sum_of_the_series_that_are_meant() -> None:
    values: Any = [({"engine": "d", "replica": "0"}, 2.0), ({"engine": "d", "replica": "1"}, 3.0)]
    values += [({"engine": "p", "replica": "0"}, 7.0)]
    families = [counter("sagellm_engine_restarts", "Of workers.", values)]

    def value(labels: str) -> float | None:
        return metric_value(families, read_check(f"sagellm_engine_restarts_total{labels} > 0", ()))

    assert value("") == 12
    assert value('{engine="d"}') == 5
    assert value("{engine=d, replica=1}") == 3
    assert value('{engine="x"}') is None


def test_options_of_a_scenario_are_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD + "set: {d.threads: [1]}\n")
    with pytest.raises(ScenarioError, match=r"set"):
        load_scenario(path)
    path.write_text(GOOD + "set: {d.threads: 1}\n")
    assert msgspec.structs.asdict(load_scenario(path).scenario)["set"] == {"d.threads": 1}
