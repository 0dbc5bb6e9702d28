"""The phases of a request follow each other, and sum to its whole time."""

import json
from dataclasses import replace

import pytest
from simulated_graphs import (
    JOINT,
    OPTIONS,
    PD,
    Simulation,
    background_workload,
    decision_log_of,
    live,
    logged_paths,
    preempting,
    random_workload,
)

from sagellm.cli import main
from sagellm.tracing.critical_path import PHASES, perfetto_events

WORKLOAD = random_workload(60, 12.0)


@pytest.mark.parametrize("text", [JOINT, PD])
@pytest.mark.parametrize("is_live", [False, True])
def test_phases_sum_to_the_whole_time(text, is_live):
    outcome = live(text, WORKLOAD) if is_live else Simulation(text).run(WORKLOAD)
    paths = logged_paths(outcome, text)
    assert len(paths) == len(WORKLOAD)
    for path in paths:
        seen = outcome.seen[path.request_id]
        assert sum(phase.seconds for phase in path.phases) == pytest.approx(path.e2e_s, abs=1e-9)
        assert path.ttft_s == pytest.approx(sum(path.before_first_token().values()), abs=1e-9)
        assert (path.first_s, path.ended_s) == (seen.first_s, seen.last_s)
        assert (path.num_tokens, path.end) == (seen.num_tokens, seen.end)
        assert set(path.totals()) <= set(PHASES)
        for before, after in zip(path.phases, path.phases[1:], strict=False):
            assert before.end_s == after.begin_s


def test_a_disaggregated_request_has_all_its_phases_in_their_places():
    paths = logged_paths(Simulation(PD).run(WORKLOAD), PD)
    found = next(path for path in paths if "transfer" in path.totals())
    where = {phase.name: phase.where for phase in found.phases}
    assert where["prefill"].startswith("prefill[")
    assert where["transfer"].startswith("transfer[")
    assert where["decode"].startswith("decode[")


def test_waiting_in_an_engine_is_its_own_phase():
    paths = logged_paths(Simulation(JOINT, replicas=1).run(random_workload(40, 40.0)), JOINT)
    assert any(path.totals().get("engine queue", 0) > 0.01 for path in paths)


@pytest.mark.parametrize("text", [JOINT, PD])
def test_a_preempted_request_waits_in_the_queue_again(text):
    text, load = preempting(text), background_workload(10.0)
    outcome = Simulation(text, replace(OPTIONS, max_num_seqs=8)).run(load)
    victims = [path for path in logged_paths(outcome, text) if path.num_preempted]
    assert victims
    for path in victims:
        assert sum(phase.seconds for phase in path.phases) == pytest.approx(path.e2e_s, abs=1e-9)
        waits = [phase for phase in path.phases if phase.name == "queue"]
        assert any(phase.begin_s > path.arrived_s for phase in waits)


def test_perfetto_gets_a_slice_for_each_phase():
    paths = logged_paths(Simulation(PD).run(WORKLOAD), PD)
    events = list(perfetto_events(paths))
    begins = [one for one in events if one["ph"] == "b"]
    ends = [one for one in events if one["ph"] == "e"]
    assert len(begins) == len(ends) == sum(len(path.phases) for path in paths)
    names = {one["args"]["name"] for one in events if one["ph"] == "M"}
    assert {"prefill[0]", "decode[1]"} <= names


@pytest.fixture
def log(tmp_path):
    found = tmp_path / "decisions"
    found.write_bytes(decision_log_of(Simulation(PD).run(WORKLOAD), PD).read())
    return found


def test_the_command_shows_all_phases_and_one_request(log, capsys):
    assert main(["trace", str(log)]) == 0
    shown = capsys.readouterr().out
    assert "60 requests ended" in shown
    assert "share of all time" in shown
    assert main(["trace", str(log), "r7"]) == 0
    assert "r7, choice 0: length after" in capsys.readouterr().out


def test_the_command_prints_objects_and_writes_a_trace_file(log, tmp_path, capsys):
    assert main(["trace", str(log), "r7", "--json", "--perfetto", str(tmp_path / "t.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(one["seconds"] for one in found["phases"]) == pytest.approx(found["e2e_s"])
    assert json.loads((tmp_path / "t.json").read_text())


def test_mistakes_have_a_fix(log, tmp_path, capsys):
    assert main(["trace", str(log), "nobody"]) == 2
    assert "no request nobody ended in this log" in capsys.readouterr().err
    (tmp_path / "empty").write_bytes(b"")
    assert main(["trace", str(tmp_path / "empty")]) == 2
    assert "name a file that --decisions wrote" in capsys.readouterr().err
    assert main(["trace", str(tmp_path / "absent")]) == 2
