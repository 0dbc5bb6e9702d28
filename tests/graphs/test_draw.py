"""Drawings as text and Mermaid: golden, complete and safe."""

from dataclasses import replace

from sagellm.graphs.ir import Edge, FrozenMap, Graph, Node, TensorType
from sagellm.graphs.passes.placement import Place
from sagellm.graphs.text.draw import as_mermaid, as_text
from sagellm.graphs.text.yaml import load

STREAM = load(
    """\
sagellm: 1
name: small
engines:
  g: {model: sage-tiny, replicas: 2}
operators:
  split:    {op: pd_split, min_uncached_tokens: 8}
  generate: {op: generate, engine: g}
edges:
  - source -> split
  - split.aggregated -> generate -> sink
  - generate ~> split
executor: {kind: tasks}
""",
    file="small.yaml",
).graph
ROWS = TensorType(("T", 64), "float32")
KERNEL = Graph(
    "tiny",
    "kernel",
    (
        Node("write", "kv_write", FrozenMap({"layer": 0})),
        Node("norm", "rms_norm", FrozenMap({"epsilon": 1e-6})),
    ),
    (
        Edge("source", "norm", "rows", type=ROWS),
        Edge("norm", "write", inlet="k", type=ROWS),
        Edge("source", "write", "kv", "kv", type="kv"),
        Edge("write", "sink", "kv", "kv", type="kv"),
    ),
    FrozenMap({"dtype": "float32"}),
)


def test_a_stream_graph_as_text() -> None:
    assert (
        as_text(STREAM)
        == f"""\
stream graph small: 2 nodes, 4 edges, hash {STREAM.hash}

engines
  g  model: sage-tiny, replicas: 2

executor
  kind  tasks

operators
  split     pd_split  min_uncached_tokens: 8
  generate  generate  engine: g

edges
  source -> split
  split.aggregated -> generate -> sink
  generate ~> split
"""
    )


def test_a_kernel_graph_as_text_lists_producers_first_with_types() -> None:
    assert (
        as_text(KERNEL)
        == f"""\
kernel graph tiny: 2 nodes, 4 edges, hash {KERNEL.hash}
  dtype: float32

  norm   rms_norm  <- source.rows  -> float32[T, 64]  {{epsilon: 1e-06}}
  write  kv_write  <- k=norm, source.kv  -> kv kv  {{layer: 0}}
  sink             <- write.kv
"""
    )


EXECUTOR = FrozenMap({"kind": "processes", "address": "ipc"})
PLACED = Place().apply(
    replace(
        STREAM,
        attrs=FrozenMap({**STREAM.attrs, "executor": EXECUTOR}),
    )
)


def section(text: str, name: str) -> list[str]:
    lines = text.split(f"\n{name}\n")[1].split("\n\n")[0]
    return lines.splitlines()


def test_a_placed_graph_as_text_says_what_runs_where() -> None:
    text = as_text(PLACED)
    assert section(text, "processes") == [
        "  graph       operators: split, generate",
        "  g      x 2  engine g, for generate",
    ]
    assert section(text, "links") == ["  generate -> g  ipc"]


def test_unfolded_it_names_each_worker() -> None:
    text = as_text(PLACED, unfold=True)
    assert [line.split()[0] for line in section(text, "processes")] == ["graph", "g[0]", "g[1]"]
    assert section(text, "links") == ["  generate -> g[0]  ipc", "  generate -> g[1]  ipc"]


def test_under_tasks_the_engines_are_in_the_same_process() -> None:
    text = as_text(Place().apply(STREAM))
    assert section(text, "processes") == ["  graph  operators: split, generate; engines: g"]


def test_a_body_is_summarised() -> None:
    nodes = (STREAM.nodes[0], replace(STREAM.nodes[1], body=KERNEL))
    text = as_text(replace(STREAM, nodes=nodes))
    line = next(line for line in text.splitlines() if line.startswith("  generate "))
    assert line.endswith(f"body tiny: 2 nodes (1 kv_write, 1 rms_norm), hash {KERNEL.hash}")


def test_a_kernel_graph_with_a_cycle_is_still_listed() -> None:
    cyclic = replace(KERNEL, edges=(Edge("norm", "write"), Edge("write", "norm")))
    assert "  write  kv_write  <- norm" in as_text(cyclic)


def test_an_empty_graph_has_a_text() -> None:
    assert as_text(Graph("nothing")).startswith("stream graph nothing: 0 nodes")
    assert as_text(Graph("nothing", "kernel")).splitlines()[-1] == "  sink  <- "


def test_mermaid_draws_nodes_labels_and_feedback() -> None:
    assert (
        as_mermaid(STREAM)
        == """\
flowchart TD
  n0(["source"])
  n3(["sink"])
  n1["split<br/>pd_split<br/>min_uncached_tokens: 8"]
  n2["generate<br/>engine: g"]
  n0 --> n1
  n1 -->|"aggregated"| n2
  n2 --> n3
  n2 -.-> n1
"""
    )


def test_mermaid_draws_processes_as_subgraphs_and_workers_beside_them() -> None:
    assert (
        as_mermaid(PLACED)
        == """\
flowchart TD
  n3["worker g: x 2<br/>engine g<br/>model: sage-tiny"]
  subgraph f0["process graph: gateway and operators"]
    n0(["source"])
    n4(["sink"])
    n1["split<br/>pd_split<br/>min_uncached_tokens: 8"]
    n2["generate<br/>engine: g"]
  end
  n0 --> n1
  n1 -->|"aggregated"| n2
  n2 --> n4
  n2 -.-> n1
  n2 <-.->|"ipc"| n3
"""
    )


def test_mermaid_folds_layers() -> None:
    nodes = tuple(Node(f"layer{n}_norm", "rms_norm") for n in range(3))
    edges = (Edge("layer0_norm", "layer1_norm"), Edge("layer1_norm", "layer2_norm"))
    graph = Graph("k", "kernel", nodes, (*edges, Edge("layer2_norm", "sink", inlet="rows")))
    assert (
        as_mermaid(graph)
        == """\
flowchart TD
  n2(["sink"])
  subgraph f0["layers 0-2: x 3"]
    n1["norm<br/>rms_norm"]
  end
  n1 -->|"rows"| n2
"""
    )
    assert as_mermaid(graph, unfold=True).count("subgraph") == 3


def test_mermaid_escapes_what_would_end_a_label() -> None:
    graph = Graph("x", nodes=(Node('a"]', "map", FrozenMap({"x": "<b>`#"})),))
    text = as_mermaid(graph)
    assert 'n1["a#34;#93;<br/>map<br/>x: #34;#60;b>#96;#35;#34;"]' in text
