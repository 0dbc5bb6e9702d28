"""Mistakes in graphs whose engines are scaled, each with its place and a fix."""

import pytest

from sagellm.builder import RESOLVER
from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.passes import run_pipeline
from sagellm.graphs.passes.placement import Place, ShareCores, replicas_of
from sagellm.graphs.sections import most_replicas, scaled_engines
from sagellm.graphs.text.codec import from_json, from_msgpack, to_json, to_msgpack
from sagellm.graphs.text.yaml import dump, load
from sagellm.opening.checking import check_graph

GOOD = """
sagellm: 1
name: scaled
engines:
  g: {model: "null", device: "null", replicas: 1, num_blocks: 64, max_model_len: 512}
operators:
  autoscale: {op: autoscale, engines: {g: {min: 1, max: 4}}, slo_ttft_s: 0.5}
  sort:      {op: policy_sort}
  route:     {op: route}
  generate:  {op: generate, engine: g}
edges:
  - source -> autoscale -> sort -> route -> generate -> sink
executor: {kind: processes}
"""


def mistakes(text):
    with pytest.raises(GraphError) as raised:
        check_graph(load(text, file="graph.yaml"), RESOLVER)
    return raised.value.diagnostics


def test_a_good_graph_is_accepted_and_survives_every_form():
    graph = check_graph(load(GOOD, file="graph.yaml"), RESOLVER)
    assert load(dump(graph), file="again").graph == graph
    assert from_json(to_json(graph)) == graph
    assert from_msgpack(to_msgpack(graph)) == graph
    (engine,) = scaled_engines(graph)
    assert (engine, most_replicas(graph, engine)) == ("g", 4)


@pytest.mark.parametrize(
    ("old", "new", "place", "message", "hint"),
    [
        ("{g: {min", "{q: {min", "7:", "no engine is called `q`", "there are g"),
        ("max: 4", "mx: 4, max: 4", "7:", "has no option `mx`", "did you mean `max`?"),
        ("min: 1", "min: 5", "7:", "`min` 5 is above `max` 4", "swap them"),
        ("min: 1", "min: 2", "7:", "begins with 1 replicas, and has from 2 to 4", "`replicas: 2`"),
        ("replicas: 1", "replicas: 5", "7:", "begins with 5 replicas", "other bounds"),
        ("max: 4", "max: 0", "7:", "`max` must be at least 1", "write a number"),
        ("{g: {min: 1, max: 4}}", "{}", "7:", "scales nothing", "{ENGINE: {max: 4}}"),
        ("{g: {min: 1, max: 4}}", "{g: 4}", "7:", "each value a mapping", "write a mapping"),
        ("slo_ttft_s", "slo_tft_s", "7:", "no option `slo_tft_s`", "did you mean `slo_ttft_s`?"),
        ("slo_ttft_s: 0.5", "forecast: hold", "7:", "`forecast` must be", "did you mean `holt`?"),
        ("kind: processes", "kind: tasks", "7:", "executor `tasks` adds no", "kind: processes"),
        ("autoscale -> sort ->", "sort -> autoscale ->", "7:", "is behind `sort`", "before `sort`"),
    ],
)  # fmt: skip
def test_mistakes_are_found(old, new, place, message, hint):
    assert old in GOOD
    (found,) = mistakes(GOOD.replace(old, new))
    assert message in found.message
    assert hint in (found.hint or "")
    assert str(found.position).startswith(f"graph.yaml:{place}")


def test_several_replicas_need_a_router_even_if_they_come_later():
    (found,) = mistakes(GOOD.replace("-> route ->", "->").replace("  route:     {op: route}\n", ""))
    assert "engine `g` has 4 replicas; nothing chooses one for `generate`" in found.message


AROUND = """
sagellm: 1
name: around
engines:
  p: {model: "null", device: "null", num_blocks: 64, max_model_len: 512}
  d: {model: "null", device: "null", num_blocks: 64, max_model_len: 512}
operators:
  sort:      {op: policy_sort}
  split:     {op: pd_split}
  autoscale: {op: autoscale, engines: {d: {max: 2}}}
  route:     {op: route}
  prefill:   {op: prefill, engine: p}
  transfer:  {op: kv_transfer}
  decode:    {op: decode, engine: d}
  route_all: {op: route}
  generate:  {op: generate, engine: d}
  metrics:   {op: metrics_sink}
edges:
  - source -> sort -> split
  - split.disaggregated -> autoscale -> route -> prefill -> transfer -> decode -> metrics -> sink
  - split.aggregated -> route_all -> generate -> metrics
executor: {kind: processes}
"""


def test_a_path_around_the_operator_is_found():
    (found,) = mistakes(AROUND)
    assert found.message == "requests reach `generate` of engine `d` without passing `autoscale`"
    assert found.hint == "put `autoscale` before `generate` on every path"


def test_an_engine_has_one_operator_that_scales_it():
    text = GOOD.replace("  sort: ", "  other: {op: autoscale, engines: {g: {max: 4}}}\n  sort: ")
    text = text.replace("-> sort ->", "-> other -> sort ->")
    (found,) = mistakes(text)
    assert "`autoscale` and `other` both scale engine `g`" in found.message


MODELS = """
sagellm: 1
name: two
engines:
  a: {model: "null", device: "null", num_blocks: 64, max_model_len: 512}
  b: {model: "null", device: "null", num_blocks: 64, max_model_len: 512}
operators:
  autoscale: {op: autoscale, engines: {a: {max: 2}, b: {max: 2}}}
  models:    {op: route_model, models: [x, y]}
  route_a:   {op: route}
  route_b:   {op: route}
  gen_a:     {op: generate, engine: a}
  gen_b:     {op: generate, engine: b}
  metrics:   {op: metrics_sink}
edges:
  - source -> autoscale -> models
  - models.x -> route_a -> gen_a -> metrics -> sink
  - models.y -> route_b -> gen_b -> metrics
executor: {kind: processes}
"""


def test_engines_of_two_models_are_not_compared():
    (found,) = mistakes(MODELS)
    assert found.message == "`autoscale` scales engines of several models: x, y"


def test_the_pools_of_all_replicas_that_may_come_must_fit():
    local = GOOD.replace('device: "null"', "device: cpu").replace(
        'model: "null"', "model: sage-tiny"
    )
    assert check_graph(load(local, file="graph.yaml"), RESOLVER).name == "scaled"
    huge = local.replace("max: 4", "max: 1000000")
    found = mistakes(huge)
    assert any("the KV pools need" in one.message for one in found)


def test_cores_are_shared_among_the_replicas_that_may_come():
    graph = load(GOOD, file="graph.yaml").graph
    placed = run_pipeline(graph, (ShareCores(8, ("g",)), Place()))
    assert placed.engines["g"]["threads"] == 2
    assert replicas_of(placed) == {"g": 1}
