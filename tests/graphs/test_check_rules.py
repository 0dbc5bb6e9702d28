"""Rules that need facts, and graphs that the YAML form cannot hold."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import pytest

import sagellm.graphs
from sagellm.graphs.check import EngineFactsView, EngineKindView, Facts, check
from sagellm.graphs.diagnostics import Diagnostic
from sagellm.graphs.ir import Edge, FrozenMap, Graph, Node
from sagellm.graphs.rules.dataflow import carried_items
from sagellm.graphs.rules.rule import CheckContext
from sagellm.graphs.text.yaml import load_file
from sagellm.graphs.vocabulary import OpSpec, Port, Vocabulary

PD = load_file(Path(sagellm.graphs.__file__).parent / "pd.yaml").graph
ENGINE = EngineFactsView(
    model_hash="m",
    dtype="float32",
    kv_cache_dtype="auto",
    block_size=16,
    num_kv_heads=2,
    head_dim=32,
    num_layers=4,
    max_model_len=1024,
    kv_pool_bytes=2**20,
    capabilities=frozenset({"kv_transfer"}),
)


def facts(**changes: object) -> Facts:
    """The facts of two engines `p` and `d`, equal but for the changes of `d`."""
    return Facts(engines={"p": ENGINE, "d": replace(ENGINE, **changes)})  # type: ignore[arg-type]


def codes(found: tuple[Diagnostic, ...]) -> list[str]:
    return [each.code for each in found]


def chain(*ops: str, **attrs: object) -> Graph:
    names = ("source", *ops, "sink")
    edges = tuple(Edge(names[n], names[n + 1]) for n in range(len(ops) + 1))
    return Graph("chain", nodes=tuple(Node(op, op).with_attrs(**attrs) for op in ops), edges=edges)


def test_equal_engines_agree(vocabulary: Vocabulary) -> None:
    assert check(PD, vocabulary, facts()) == ()


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("model_hash", "other", "different models"),
        ("dtype", "bfloat16", "dtype: float32 and bfloat16"),
        ("kv_cache_dtype", "int8", "KV cache dtype: auto and int8"),
        ("block_size", 32, "block size: 16 and 32"),
        ("num_kv_heads", 4, "number of KV heads: 2 and 4"),
        ("head_dim", 64, "head dimension: 32 and 64"),
        ("num_layers", 8, "number of layers: 4 and 8"),
        ("max_model_len", 512, "context limit: 1024 and 512"),
    ],
)
def test_prefill_and_decode_must_agree(
    vocabulary: Vocabulary, name: str, value: object, word: str
) -> None:
    (found,) = check(PD, vocabulary, facts(**{name: value}))
    assert found.code == "pd-mismatch"
    assert found.path[:2] == ("engines", "d")
    assert word in found.message
    assert found.hint is not None
    assert "same" in found.hint


def test_unknown_facts_break_no_rule(vocabulary: Vocabulary) -> None:
    assert check(PD, vocabulary, facts(block_size=None, model_hash=None)) == ()


def test_different_models_are_reported_without_further_facts(vocabulary: Vocabulary) -> None:
    assert len(check(PD, vocabulary, facts(model_hash="other", num_layers=8, head_dim=64))) == 1


def test_engines_that_exchange_nothing_may_differ(vocabulary: Vocabulary) -> None:
    edges = tuple(Edge(*ends) for ends in (("source", "generate"), ("generate", "sink")))
    graph = replace(chain("generate", engine="d"), edges=edges)
    graph = replace(graph, attrs=FrozenMap({"engines": FrozenMap({"d": FrozenMap()})}))
    assert check(graph, vocabulary, facts(block_size=1)) == ()


@pytest.mark.parametrize(("last", "expected"), [("d", ["missing-transfer"]), ("p", [])])
def test_leases_change_engines_by_a_transfer_only(
    vocabulary: Vocabulary, last: str, expected: list[str]
) -> None:
    options = {"prefill": {"engine": "p"}, "map": {"function": "f"}, "decode": {"engine": last}}
    graph = chain(*options)
    nodes = tuple(node.with_attrs(**options[node.op]) for node in graph.nodes)
    engines = freeze_engines({name: {} for name in dict.fromkeys(("p", last))})
    graph = replace(graph, nodes=nodes, attrs=FrozenMap({"engines": engines}))
    assert codes(check(graph, vocabulary, facts())) == expected


def test_a_missing_capability_names_an_engine_that_has_it(vocabulary: Vocabulary) -> None:
    unable = replace(ENGINE, capabilities=frozenset({"logprobs"}))
    (found,) = check(PD, vocabulary, Facts(engines={"p": unable, "d": ENGINE}))
    assert found.code == "missing-capability"
    assert "kv_transfer" in found.message
    assert found.hint == "use engine `d`"
    (found,) = check(PD, vocabulary, Facts(engines={"p": unable}))
    assert found.hint == "it offers logprobs"


def test_pools_share_the_memory(vocabulary: Vocabulary) -> None:
    two = facts()
    assert check(PD, vocabulary, replace(two, memory_bytes=2 * 2**20)) == ()
    (found,) = check(PD, vocabulary, replace(two, memory_bytes=2**20 + 2**19))
    assert found.code == "too-much-memory"
    assert "2.0 MiB" in found.message
    block_bytes = 2 * 4 * 2 * 32 * 16 * 4  # keys and values, layers, heads, width, tokens, float32
    assert found.hint == f"{2**19 // block_bytes} blocks a replica of `p` would fit"


def test_more_blocks_in_8_bits_would_fit(vocabulary: Vocabulary) -> None:
    small = replace(ENGINE, kv_cache_dtype="int8")
    both = Facts(engines={"p": small, "d": small}, memory_bytes=2**20 + 2**19)
    (found,) = check(PD, vocabulary, both)
    block_bytes = 2 * 4 * 2 * (32 + 2) * 16  # as above, with a byte a number and a scale of two
    assert found.hint == f"{2**19 // block_bytes} blocks a replica of `p` would fit"


def test_pools_of_two_devices_do_not_share_their_memory(vocabulary: Vocabulary) -> None:
    here, there = (replace(ENGINE, device=name, memory_bytes=2**20) for name in ("a", "b"))
    assert check(PD, vocabulary, Facts(engines={"p": here, "d": there}, memory_bytes=1)) == ()
    (found,) = check(PD, vocabulary, Facts(engines={"p": here, "d": here}))
    assert found.code == "too-much-memory"


def test_each_replica_has_a_pool(vocabulary: Vocabulary) -> None:
    found = check(PD, vocabulary, replace(facts(replicas=3), memory_bytes=3 * 2**20))
    assert "4.0 MiB" in found[0].message
    assert found[0].path == ("engines", "d")
    assert found[0].hint == "21 blocks a replica of `d` would fit"


def test_no_number_of_blocks_is_promised_where_none_fits(vocabulary: Vocabulary) -> None:
    (found,) = check(PD, vocabulary, replace(facts(block_size=None), memory_bytes=5))
    assert found.hint == "give the engines fewer KV blocks"


def test_replicas_known_from_facts_need_a_router(vocabulary: Vocabulary) -> None:
    (found,) = check(PD, vocabulary, facts(replicas=2))
    assert found.code == "unrouted-replicas"
    assert found.path == ("operators", "generate")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    model: str
    replicas: int = field(default=1, metadata={"min": 1})


def test_engine_options_are_checked_like_those_of_operators(vocabulary: Vocabulary) -> None:
    engines = {"p": {"model": "m", "devise": "cpu"}, "d": {"replicas": 0}}
    graph = replace(PD, attrs=FrozenMap({"engines": freeze_engines(engines)}))
    found = check(graph, vocabulary, Facts(engine_kinds={"local": EngineKindView(EngineOptions)}))
    assert [each.path for each in found] == [
        ("engines", "p", "devise"),
        ("engines", "d", "replicas", "value"),
        ("engines", "d"),
    ]
    assert codes(found) == ["unknown-option", "out-of-range", "missing-option"]


def freeze_engines(engines: dict[str, dict[str, object]]) -> FrozenMap:
    return FrozenMap(
        (name, Node("", "").with_attrs(**given).attrs) for name, given in engines.items()
    )


@dataclass(frozen=True, slots=True)
class Sorting:
    policy: str = field(default="fifo", metadata={"names": "policies"})


def test_a_name_of_an_open_set_is_looked_up() -> None:
    spec = OpSpec("sort", (Port("in", "request"),), (Port("out", "event"),), Sorting)
    vocabulary = Vocabulary({"sort": spec})
    known = Facts(names=MappingProxyType({"policies": frozenset({"fifo", "mine"})}))
    assert check(chain("sort", policy="mine"), vocabulary, known) == ()
    (found,) = check(chain("sort", policy="mien"), vocabulary, known)
    assert found.code == "wrong-value"
    assert found.hint == "did you mean `mine`?"
    assert check(chain("sort", policy="mien"), vocabulary, Facts()) == ()


def test_items_follow_same_along_the_graph(vocabulary: Vocabulary) -> None:
    found = carried_items(CheckContext(PD, vocabulary, Facts()))
    assert found["metrics", "out"] == {"event"}
    assert found["transfer", "out"] == {"prefilled"}


def test_requests_may_not_leave_unanswered(vocabulary: Vocabulary) -> None:
    (found,) = check(chain("map", function="f"), vocabulary, Facts())
    assert found.code == "wrong-item"
    assert found.message == "`sink` takes answer or embedding or event, not request"
    assert found.hint == "put `embed` or `generate` between"


def test_two_inlets_are_fed_each(vocabulary: Vocabulary) -> None:
    graph = chain("join")
    edges = (Edge("source", "join", inlet="left"), Edge("join", "sink"))
    (found,) = check(replace(graph, edges=edges), vocabulary, Facts())
    assert found.code == "unfed-inlet"
    assert found.hint == "write `... -> join.right`"


def test_feedback_feeds_no_inlet(vocabulary: Vocabulary) -> None:
    graph = chain("admission", "generate", engine="g")
    edges = (
        *graph.edges[:1],
        Edge("generate", "sink"),
        Edge("admission", "generate", feedback=True),
    )
    found = check(replace(graph, edges=edges), vocabulary, Facts())
    assert {"unfed-inlet", "dangling-outlet"} <= set(codes(found))


def test_an_island_and_its_cycle_are_reported(vocabulary: Vocabulary) -> None:
    graph = chain("generate")
    ring = (Edge("admission", "policy_sort"), Edge("policy_sort", "admission"))
    nodes = (*graph.nodes, Node("admission", "admission"), Node("policy_sort", "policy_sort"))
    found = check(Graph("x", nodes=nodes, edges=(*graph.edges, *ring)), vocabulary, Facts())
    assert codes(found)[-3:] == ["unreachable", "unreachable", "cycle"]


@pytest.mark.parametrize(
    ("graph", "code"),
    [
        (Graph("x", nodes=(Node("a", "collect"), Node("a", "collect"))), "duplicate-node"),
        (Graph("x", nodes=(Node("sink", "collect"),)), "reserved-name"),
        (Graph("x", edges=(Edge("sink", "source"),)), "into-source"),
        (Graph("x", edges=(Edge("sink", "source"),)), "out-of-sink"),
        (Graph("x", edges=(Edge("source", "sink", outlet="late"),)), "unknown-outlet"),
        (Graph("x", edges=(Edge("source", "sink", inlet="late"),)), "unknown-inlet"),
        (Graph("x", attrs=FrozenMap({"executor": "tasks"})), "unknown-executor"),
        (Graph("x", attrs=FrozenMap({"engines": FrozenMap({"g": 1})})), "wrong-type"),
        (Graph("x", nodes=(Node("a", "decode"),)), "missing-option"),
        (Graph("x", nodes=(Node("a", "decode", FrozenMap({"engine": 1})),)), "wrong-type"),
    ],
)
def test_mistakes_that_only_a_program_can_make(
    vocabulary: Vocabulary, graph: Graph, code: str
) -> None:
    assert code in codes(check(graph, vocabulary, Facts()))


def test_kernel_graphs_are_checked_elsewhere(vocabulary: Vocabulary) -> None:
    with pytest.raises(ValueError, match="not a kernel graph"):
        check(Graph("x", "kernel"), vocabulary, Facts())
