"""The arms of a test, read from a log and from a table, and compared by `sagellm ab`."""

import json
from dataclasses import replace
from random import Random

import pytest

from sagellm.cli import main
from sagellm.experiments.arms import ArmRequest, NoArms, compare_arms, read_arms
from sagellm.experiments.confidence import BETTER_A, BETTER_B, EQUAL, OPEN, ABTest
from sagellm.graphs.text.yaml import load
from sagellm.load.traces import PlannedRequest
from sagellm.opening.decisions import DecisionFile
from sagellm.operators.ab_split import ABSplitOptions, arm_of
from sagellm.simulation.figures import write_csv
from sagellm.simulation.simulation_run import SimulationPoint, simulate

# Arm b has engines of its own, which are twice as fast.
GRAPH = """
sagellm: 1
name: two_engines
engines:
  slow: {kind: modelled, model: 'null', prefill_token_s: 0.0002, decode_step_s: 0.02}
  fast: {kind: modelled, model: 'null', prefill_token_s: 0.0001, decode_step_s: 0.01}
operators:
  ab:     {op: ab_split}
  sort_a: {op: policy_sort}
  one:    {op: generate, engine: slow}
  sort_b: {op: policy_sort}
  two:    {op: generate, engine: fast}
edges:
  - source -> ab
  - ab.a -> sort_a -> one -> sink
  - ab.b -> sort_b -> two -> sink
"""
NUMBER = 240


def workload(number=NUMBER):
    source = Random(7)
    return [
        PlannedRequest(
            0.2 * place,
            int(source.uniform(200, 800)),
            10,
            user_id=f"u{place % 120}",
            slo_ttft_s=0.1,
        )
        for place in range(number)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ab")
    log, table = folder / "decisions.log", folder / "requests.csv"
    point = SimulationPoint(load(GRAPH, file="two.yaml"), workload(), decisions=DecisionFile(log))
    write_csv(table, simulate(point).requests)
    return log, table


def test_log_and_table_have_the_same_requests(files):
    log, table = files
    from_log, from_table = read_arms(log), read_arms(table)
    assert len(from_log) == len(from_table) == NUMBER
    for one, other in zip(from_log, from_table, strict=True):
        assert one.unit == f"user_id:{other.unit}"
        assert one.arm == other.arm == arm_of(one.unit, ABSplitOptions())
        assert (one.end, one.slo_ttft_s) == (other.end, other.slo_ttft_s) == ("length", 0.1)
        times = [(x.arrived_s, x.ttft_s, x.tpot_s, x.e2e_s) for x in (one, other)]
        assert times[0] == pytest.approx(times[1])


def test_the_faster_arm_wins_by_each_metric(files):
    found = {
        one.metric.name: one for one in compare_arms(read_arms(files[0]), ABTest(), block_s=1.0)
    }
    assert {name: one.verdict for name, one in found.items()} == {
        "ttft": BETTER_B,
        "tpot": BETTER_B,
        "e2e": BETTER_B,
        "attainment": BETTER_B,
        "unserved": OPEN,
    }
    ttft = found["ttft"]
    assert ttft.found.mean_a > 1.8 * ttft.found.mean_b
    assert ttft.num_a + ttft.num_b == NUMBER
    assert ttft.units_a + ttft.units_b == 120
    assert 60 < ttft.decided_at < NUMBER


def test_requests_after_the_first_open_one_do_not_count():
    """Else the slow requests of an arm would be missing as long as they are open."""
    ended = [
        ArmRequest("ab"[n % 2], f"{n}", float(n), "stop", 1.0, None, 2.0, None) for n in range(40)
    ]
    assert [one.num_a for one in compare_arms(ended, ABTest())] == [20, 20, 20]
    open_one = replace(ended[10], end="", ttft_s=None)
    found = compare_arms([*ended[:10], open_one, *ended[11:]], ABTest())
    assert [one.num_a for one in found] == [5, 5, 5]


def test_the_order_is_that_of_arrivals():
    late = [
        ArmRequest("ab"[n % 2], f"{n}", float(n), "stop", float(n % 2 == 0), None, 2.0, None)
        for n in range(200)
    ]
    spread = [replace(one, ttft_s=one.ttft_s + 0.1 * (n % 3)) for n, one in enumerate(late)]
    forwards, backwards = (
        compare_arms(one, ABTest(), block_s=4.0) for one in (spread, spread[::-1])
    )
    assert forwards == backwards
    assert 117 <= forwards[0].decided_at <= 120  # thirty blocks of four requests


def test_refused_requests_have_no_latency_and_miss_their_objective():
    requests = [
        ArmRequest("a", "1", 0.0, "stop", 0.5, 0.1, 1.0, None),
        ArmRequest("b", "2", 1.0, "refused", None, None, 0.0, None),
        ArmRequest("b", "3", 2.0, "stop", 2.0, 0.1, 3.0, 2.5),
    ]
    found = {one.metric.name: one.found for one in compare_arms(requests, ABTest(), slo_ttft_s=1.0)}
    assert (found["ttft"].mean_a, found["ttft"].mean_b) == (0.5, 2.0)
    assert (found["attainment"].mean_a, found["attainment"].mean_b) == (1.0, 0.5)
    assert (found["unserved"].mean_a, found["unserved"].mean_b) == (0.0, 0.5)


def test_the_command_says_to_stop(files, capsys):
    assert main(["ab", str(files[0]), "--block", "1"]) == 0
    shown = capsys.readouterr().out
    assert "TTFT: stop: b is better, after" in shown
    assert main(["ab", str(files[1]), "--metric", "unserved", "--block", "1"]) == 0
    assert "not served: keep going: no difference so far" in capsys.readouterr().out


def test_the_command_prints_json(files, capsys):
    assert main(["ab", str(files[1]), "--json", "--metric", "e2e", "--block", "1"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["metric"] for one in found if one["decides"]] == ["e2e"]
    first = found[0]
    low, high = first["always_valid_interval"]
    assert low < first["interval"][0] < first["difference"] < first["interval"][1] < high < 0
    assert first["verdict"] == BETTER_B
    assert first["requests_needed"] is None
    assert first["blocks"] == 48
    assert abs(first["block_correlation"]) < 0.3


def test_few_units_keep_a_test_going(tmp_path, capsys):
    log = tmp_path / "log"
    point = SimulationPoint(load(GRAPH, file="two.yaml"), workload(20), decisions=DecisionFile(log))
    simulate(point)
    assert main(["ab", str(log)]) == 0
    assert "keep going: each arm needs 30 units, and the test 30 blocks" in capsys.readouterr().out


def test_blocks_that_are_too_short_are_named(tmp_path, capsys):
    """Waits that drift slowly, the arms apart."""
    table = tmp_path / "requests.csv"
    names = "number,arrived_s,ended_s,arm,user_id,end,ttft_s,tpot_s,e2e_s,slo_ttft_s"
    rows = [
        f"{n},{n},{n + 1},{'ab'[n % 2]},,stop,{2 + (n % 2) * (n // 50 % 2)},,3," for n in range(400)
    ]
    table.write_text("\n".join([names, *rows]))
    assert main(["ab", str(table), "--block", "4"]) == 0
    assert "a block of time tells of the next (correlation 0.89)" in capsys.readouterr().out
    assert main(["ab", str(table), "--block", "100"]) == 0
    assert "keep going: each arm needs" in capsys.readouterr().out


def test_equal_arms_stop_within_the_margin():
    source = Random(2)
    requests = [
        ArmRequest("ab"[n % 2], f"{n}", float(n), "stop", source.uniform(1, 1.2), None, 2.0, None)
        for n in range(400)
    ]
    (ttft, *_) = compare_arms(requests, ABTest(), block_s=4.0, margin=0.02)
    assert ttft.verdict == EQUAL
    (ttft, *_) = compare_arms(requests, ABTest(), block_s=4.0, margin=0.001)
    assert ttft.verdict == OPEN
    worse = [replace(one, ttft_s=one.ttft_s + 0.3 * (one.arm == "b")) for one in requests]
    assert compare_arms(worse, ABTest(), block_s=4.0, margin=0.02)[0].verdict == BETTER_A


PLAIN = GRAPH.replace("ab_split}", "pd_split}").replace("ab.a", "ab.aggregated")


@pytest.mark.parametrize(
    ("graph", "options", "said"),
    [
        (PLAIN.replace("ab.b", "ab.disaggregated"), [], "no request of this log was assigned"),
        (GRAPH, ["--operator", "split"], "split assigns no arms"),
    ],
)
def test_a_log_without_arms_is_refused(graph, options, said, tmp_path, capsys):
    log = tmp_path / "log"
    simulate(SimulationPoint(load(graph, file="g.yaml"), workload(3), decisions=DecisionFile(log)))
    assert main(["ab", str(log), *options]) == 2
    assert said in capsys.readouterr().err


def test_of_several_splits_one_must_be_chosen(tmp_path):
    text = GRAPH.replace("sort_a: {op: policy_sort}", "sort_a: {op: ab_split, experiment: two}")
    text = text.replace("ab.a -> sort_a -> one -> sink", "ab.a -> sort_a\n  - sort_a.a -> one")
    text = text.replace("  - ab.b", "  - sort_a.b -> one\n  - one -> sink\n  - ab.b")
    log = tmp_path / "log"
    simulate(SimulationPoint(load(text, file="g.yaml"), workload(40), decisions=DecisionFile(log)))
    with pytest.raises(NoArms, match="ab, sort_a assign arms"):
        read_arms(log)
    every, some = read_arms(log, "ab"), read_arms(log, "sort_a")
    assert len(every) == 40
    assert len(some) == sum(one.arm == "a" for one in every)


def test_a_table_without_arms_is_refused(tmp_path, capsys):
    table = tmp_path / "requests.csv"
    table.write_text("number,arm\n1,\n")
    assert main(["ab", str(table)]) == 2
    assert "no request of this table has an arm" in capsys.readouterr().err
    assert main(["ab", str(tmp_path / "none")]) == 2
