"""Scenarios over real processes: checks pass, or fail with the value found."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sagellm.chaos.scenario import ScenarioError, load_scenario
from sagellm.chaos.scenario_run import run_scenario

EXAMPLES = Path(__file__).parents[3] / "examples" / "chaos"
TIMED = pytest.mark.alone  # they bound the gaps of streams in real time
QUICK = (  # `make chaos` runs all
    pytest.param("kill", marks=TIMED),
    pytest.param("damaged_kv", marks=pytest.mark.soak),
    pytest.param("comings_and_goings", marks=(TIMED, pytest.mark.soak)),
)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    read = time.time
    yield
    assert time.time is read
    assert not [child for child in psutil.Process().children() if "chaos" in _command(child)]
    assert "SAGELLM_CHAOS_KV_DAMAGE" not in os.environ


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.parametrize("name", QUICK)
async def test_what_the_examples_say_holds(name: str) -> None:
    report = await run_scenario(load_scenario(EXAMPLES / f"{name}.yaml"))
    assert report.failed == []


SCENARIO = """
sagellm_chaos: 1
name: x
graph: pd_many
set: {p.device: 'null', d.device: 'null'}
events:
  - load: {streams: 4, max_tokens: 60}
"""


async def test_a_check_that_fails_says_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    checks = ["num_streams == 5", 'sagellm_engine_up{engine="d"} == 3', "sagellm_nothing == 0"]
    path.write_text(SCENARIO + f"checks: {checks}\n")
    report = await run_scenario(load_scenario(path))
    assert report.failed == [
        "num_streams == 5: it is 4",
        'sagellm_engine_up{engine="d"} == 3: it is 2',
        "sagellm_nothing == 0: there is no such metric",
    ]


@pytest.mark.parametrize(
    ("event", "wrong"),
    [
        ('{kill: "d[7]"}', "no worker 'd\\[7\\]': there are"),
        ('{after_tokens: 99, kill: "d[0]"}', "all have ended"),
    ],
)
async def test_an_event_that_cannot_happen_ends_the_scenario(
    event: str, wrong: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(SCENARIO + f"  - {event}\n")
    with pytest.raises(ExceptionGroup) as raised:
        await run_scenario(load_scenario(path))
    assert raised.group_contains(ScenarioError, match=wrong)


async def test_damage_that_nobody_would_do_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(SCENARIO.replace("set: {", "set: {executor.kv: tcp, ") + "kv_damage: 0.5\n")
    with pytest.raises(ScenarioError, match=r"is for executor\.kv: memory"):
        await run_scenario(load_scenario(path))
