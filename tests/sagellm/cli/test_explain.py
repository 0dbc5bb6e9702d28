"""`sagellm explain`: a graph and a trace in, what bounds it out."""

import json

import pytest

from sagellm.cli import main

GRAPH = """
sagellm: 1
name: one
engines:
  g: {kind: modelled, model: 'null', max_num_seqs: 2, max_num_batched_tokens: 64}
operators:
  sort:     {op: policy_sort}
  generate: {op: generate, engine: g}
  metrics:  {op: metrics_sink}
edges:
  - source -> sort -> generate -> metrics -> sink
"""
LOAD = "synthetic:rate=4,arrivals=constant,requests=24,input=16,output=100"


@pytest.fixture
def explain(tmp_path, capsys):
    (tmp_path / "graph.yaml").write_text(GRAPH)

    def command(*options, graph=str(tmp_path / "graph.yaml"), slo="ttft=1", code=0):
        found = main(["explain", graph, "--trace", LOAD, "--slo", slo, *options])
        out, err = capsys.readouterr()
        assert found == code, err
        return out if not code else err

    return command


def test_what_bounds_the_graph_stands_first(explain):
    shown = explain()
    assert "bound by:  max_num_seqs of g" in shown
    assert "fixed time of g" in shown
    assert "replicas of g" not in shown  # nothing chooses one


def test_resources_are_ranked_by_their_gain(explain):
    found = json.loads(explain("--json"))
    assert found["bound_by"] == found["resources"][0]["resource"] == "max_num_seqs of g"
    gains = [one["goodput_gain"] for one in found["resources"]]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 0.5
    assert found["missed"]["ttft"] > 0.3


def test_another_value_bounds_less(explain):
    found = json.loads(explain("--json", "--set", "g.max_num_seqs=16"))
    assert found["attained"] == 1.0


@pytest.mark.soak
def test_processes_find_the_same(explain):
    assert explain("--json", "--processes", "2") == explain("--json")


def test_an_engine_that_computes_needs_a_profile(explain):
    assert "--profile" in explain(graph="joint", code=2)
    shown = explain("--profile", "h100-sxm", "--set", "g.model=llama-3-8b", graph="joint")
    assert "memory bandwidth of g" in shown


def test_the_parts_of_a_measured_profile_are_changed_one_by_one(explain):
    found = json.loads(explain("--profile", "epyc-zen5-sage-tiny", "--json", graph="joint"))
    names = {one["resource"] for one in found["resources"]}
    assert {"time of tokens of g", "time of contexts of g", "fixed time of g"} < names


def test_a_wrong_level_is_refused(explain):
    assert "did you mean ttft?" in explain(slo="tftt=1", code=2)
