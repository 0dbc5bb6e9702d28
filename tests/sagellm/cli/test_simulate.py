"""`sagellm simulate`: a graph and a trace in, figures out."""

import json
import re

import pytest

from sagellm.cli import main

GRAPH = """
sagellm: 1
name: one
engines:
  g: {kind: modelled, model: 'null', replicas: 2, prefill_token_s: 0.001, decode_step_s: 0.01}
operators:
  sort:     {op: policy_sort}
  route:    {op: route, strategy: random}
  generate: {op: generate, engine: g}
  metrics:  {op: metrics_sink}
edges:
  - source -> sort -> route -> generate -> metrics -> sink
"""
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:00:{number:02d}.000000,{100 + 20 * number},{10 + number}\n"
    for number in range(20)
)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "graph.yaml").write_text(GRAPH)
    (tmp_path / "trace.csv").write_text(TRACE)
    return tmp_path


@pytest.fixture
def simulate(files, capsys):
    def command(*options, code=0, graph=None, trace=None):
        named = graph or str(files / "graph.yaml")
        found = main(["simulate", named, "--trace", str(trace or files / "trace.csv"), *options])
        out, err = capsys.readouterr()
        assert found == code, err
        return out if not code else err

    return command


def test_the_figures_are_one_object(simulate):
    found = json.loads(simulate("--json", "--slo-ttft", "0.3"))
    assert (found["requests"], found["served"]) == (20, 20)
    assert {"p50", "p90", "p99"} <= set(found["ttft_ms"]) & set(found["tpot_ms"])
    names = {"goodput_rps", "slo_attainment", "prefix_hit_rate", "load_imbalance", "cost"}
    assert names <= set(found)
    assert found["slo_attainment"] < 1.0


def test_equal_arguments_print_equal_figures(simulate):
    assert simulate("--json") == simulate("--json")


def test_the_table_shows_latencies_and_engines(simulate):
    shown = simulate()
    assert "20 of 20 served" in shown
    assert "TTFT" in shown
    assert "busiest" in shown


def test_a_sweep_has_a_line_for_each_combination(simulate):
    text = simulate("--sweep", "speedup=1,10", "--sweep", "sort.policy=fifo,priority", "--json")
    found = json.loads(text)
    assert [one["values"] for one in found] == [
        {"speedup": speedup, "sort.policy": policy}
        for speedup in (1.0, 10.0)
        for policy in ("fifo", "priority")
    ]
    assert found[2]["ttft_ms"]["p99"] > found[0]["ttft_ms"]["p99"]


def test_a_sweep_in_two_processes_gives_the_same(simulate):
    options = ("--sweep", "speedup=1,10", "--json")
    assert simulate(*options, "--processes", "2") == simulate(*options)


def test_another_process_imports_what_the_graph_uses(files, simulate):
    (files / "own.py").write_text(
        "import sagellm\n\n@sagellm.function('swept')\ndef swept(request):\n    return request\n"
    )
    own = "own: {op: map, function: swept}"
    text = GRAPH.replace("operators:", f"imports: [own.py]\noperators:\n  {own}")
    (files / "own.yaml").write_text(text.replace("source -> sort", "source -> own -> sort"))
    options = ("--sweep", "speedup=1,2", "--processes", "2", "--json")
    found = json.loads(simulate(*options, graph=str(files / "own.yaml")))
    assert [one["served"] for one in found] == [20, 20]


def test_a_sweep_with_a_wrong_point_runs_none(simulate):
    options = ("--sweep", "sort.policy=fifo,fiffo", "--processes", "2")
    assert "fiffo" in simulate(*options, code=2)


def test_a_replica_that_dies_costs_time_and_no_request(simulate):
    whole = json.loads(simulate("--json", "--speedup", "10"))
    found = json.loads(simulate("--fault", "g:0@0.5+10", "--json", "--speedup", "10"))
    assert found["served"] == whole["served"] == 20
    assert found["e2e_ms"]["mean"] > whole["e2e_ms"]["mean"]


def test_seeds_give_estimates_of_random_decisions(simulate):
    found = json.loads(simulate("--seeds", "3", "--json", "--speedup", "20"))
    assert found["seeds"] == 3
    assert found["estimates"]["ttft_ms.p50"]["deviation"] > 0


def test_its_decisions_replay(simulate, files, capsys):
    log = files / "decisions"
    simulate("--decisions", str(log))
    assert main(["replay", str(log)]) == 0
    assert "identical" in capsys.readouterr().out


def test_decisions_by_cached_prefixes_replay(files, simulate, capsys):
    shared = [
        {
            "timestamp": 500 * n,
            "input_length": 1100 + n,
            "output_length": 5,
            "hash_ids": [n % 3, 10 + n % 3, 100 + n],
        }
        for n in range(12)
    ]
    trace, log = files / "shared.jsonl", files / "decisions"
    trace.write_text("\n".join(map(json.dumps, shared)))
    options = ("--set", "route.strategy=prefix_aware", "--set", "g.block_size=64", "--json")
    options += ("--set", "g.num_blocks=60", "--set", "g.max_model_len=1400")
    one = json.loads(simulate(*options, trace=trace))
    other = json.loads(simulate(*options, "--decisions", str(log), trace=trace))
    assert one == other
    assert one["prefix_hit_rate"] > 0.5
    assert main(["replay", str(log)]) == 0
    assert "identical" in capsys.readouterr().out
    again = files / "again"
    simulate(*options, "--decisions", str(again), trace=trace)
    assert again.read_bytes() == log.read_bytes()


def test_requests_and_pictures_are_written(simulate, files):
    pytest.importorskip("matplotlib")
    simulate("--csv", str(files / "out.csv"), "--plot", str(files / "run.png"))
    simulate("--sweep", "speedup=1,2", "--plot", str(files / "sweep.png"))
    assert (files / "out.csv").read_text().count("\n") == 21
    assert (files / "run.png").read_bytes()[:4] == (files / "sweep.png").read_bytes()[:4]


@pytest.mark.parametrize(
    ("options", "cause", "fix"),
    [
        (("--set", "g.kind=local"), "engine g: kind local has no cost model", "give --profile"),
        (("--sweep", "policy=fifo"), "does not say what is swept", "NAME.OPTION=VALUE"),
        (("--sweep", "speedup=fast"), "fast is not a speed", "above 0"),
        (("--sweep", "speedup=1,2", "--seeds", "2"), "both ask for several", "leave one out"),
        (("--fault", "g@3"), "cannot be read", "as g:1@30+5"),
        (("--fault", "g:7@3+1"), "no replica 7 of engine g can die", "give one of g[0..1]"),
        (("--fault", "g:0@3+4", "--fault", "g:0@5+1"), "dead already", "after 7 s"),
        (("--sweep", "sort.policy=fifo", "--sweep", "sort.policy=priority"), "twice", "in one"),
        (("--processes", "2"), "there is none", "add --sweep"),
        (("--profile", "h200"), "a cost model of its own", "leave --profile out"),
        (("--link-latency", "0.1"), "moves no KV blocks", "leave it out"),
        (("--price", "g=-1"), "-1 is not a price", "ENGINE=NUMBER"),
        (("--plot", "run.xyz"), "no picture of this kind", "png"),
        (("--csv", "/absent/out.csv"), "no such folder", "make it first"),
        (("--price", "h=2"), "no such engine", "there are g"),
        (("--price", "g=cheap"), "cheap is not a price", "ENGINE=NUMBER"),
        (("--seeds", "2", "--decisions", "d"), "--decisions is of one run", "leave one out"),
    ],
)
def test_mistakes_have_a_cause_and_a_fix(simulate, options, cause, fix):
    shown = simulate(*options, code=2)
    assert cause in shown
    assert fix in shown


def test_an_async_function_has_no_model(files, simulate):
    (files / "own.py").write_text(
        "import sagellm\n\n@sagellm.function('own')\nasync def own(request):\n    return request\n"
    )
    own = "own: {op: map, function: own}"
    text = GRAPH.replace("operators:", f"operators:\n  {own}")
    (files / "own.yaml").write_text(text.replace("source -> sort", "source -> own -> sort"))
    shown = simulate("--import", str(files / "own.py"), code=2, graph=str(files / "own.yaml"))
    assert "waits for an async function" in shown


MEASURED = {
    "name": "m",
    "model": None,
    "device": "cpu",
    "method": "measured",
    "made_on": "2026-11-25",
    "cost": {
        "form": "fitted",
        "step_s": 0.01,
        "tokens": [0, 1],
        "token_seconds": [0, 0.0001],
        "prefill_pair_s": 0.0,
        "contexts": [0],
        "context_seconds": [0],
        "row_s": 0.0,
    },
    "spread": [{"from_s": 0.0, "ratios": [0.7, 0.8, 0.85, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5]}],
}


@pytest.fixture
def one_way(files):
    """A graph without a random decision, and a function that writes a profile."""
    graph = files / "one_way.yaml"
    text = GRAPH.replace("replicas: 2, prefill_token_s: 0.001, decode_step_s: 0.01", "replicas: 1")
    graph.write_text(text.replace("strategy: random", "strategy: load_balanced"))

    def profiled(**changes):
        file = files / "m.json"
        file.write_text(json.dumps({**MEASURED, **changes}))
        return str(graph), ("--set", f"g.profile={file}")

    return profiled


def test_each_seed_draws_step_times_within_the_spread(simulate, one_way):
    graph, options = one_way()
    printed = simulate("--json", "--seeds", "4", *options, graph=graph)
    one = json.loads(printed)["estimates"]["ttft_ms.p50"]
    assert one["low"] < one["mean"] < one["high"]
    assert one["deviation"] > 0
    assert simulate("--json", "--seeds", "4", *options, graph=graph) == printed


def test_without_a_spread_all_seeds_are_alike(simulate, one_way):
    graph, options = one_way(spread=[])
    found = json.loads(simulate("--json", "--seeds", "3", *options, graph=graph))
    assert {one["deviation"] for one in found["estimates"].values()} == {0.0}


def test_the_table_shows_the_interval_over_the_seeds(simulate, one_way):
    graph, options = one_way()
    text = simulate("--seeds", "3", *options, graph=graph)
    assert re.search(r"ttft_ms\.p50: [\d.]+ \+- [\d.]+, [\d.]+ to [\d.]+ over the seeds", text)


def test_a_faulty_spread_is_refused(simulate, one_way):
    graph, options = one_way(spread=[{"from_s": 0.0, "ratios": [1.0]}])
    assert "1 ratios, but 9 quantiles" in simulate(*options, graph=graph, code=2)
