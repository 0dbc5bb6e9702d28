"""Engine kinds, operators and documents agree with each other."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from text_kind import PARROT

from sagellm import Graph, ops
from sagellm.backends import get_backend
from sagellm.extensions import RESOLVER
from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.vocabulary import CAPABILITIES
from sagellm.opening.checking import check_graph, checked_graph
from sagellm.opening.graph_engines import describe_engine, engine_options, open_replica
from sagellm.runtime.engine.kinds import KINDS, ReplicaPlace
from sagellm.runtime.handover import NEEDS
from sagellm.runtime.registry import _warn_of_old_name

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs" / "engines.md").read_text()
SHIPPED = {name: KINDS[name] for name in KINDS.ours}
OPERATORS = {name: spec for name, spec in RESOLVER.vocabulary.items() if spec.engine}


def needed() -> set[str]:
    """All needs of operators and requests, with alternatives as "a|b"."""
    return {*NEEDS, *(need for spec in OPERATORS.values() for need in spec.needs)}


def test_every_capability_that_a_kind_declares_is_asked_for() -> None:
    declared = PARROT.CAPABILITIES.union(*(kind.capabilities for kind in SHIPPED.values()))
    asked = {name for need in needed() for name in need.split("|")}
    assert declared == asked == set(CAPABILITIES)


def test_every_need_is_met_by_a_kind_that_ships() -> None:
    offered = frozenset[str]().union(*(kind.capabilities for kind in SHIPPED.values()))
    assert {need for need in needed() if not offered & set(need.split("|"))} == set()


def rows(section: str) -> list[list[str]]:
    table = DOC.split(f"## {section}")[1].split("\n## ")[0]
    return [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]


def words(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


def test_the_docs_have_every_option_with_its_kinds() -> None:
    documented = {
        (kind, option)
        for options, kinds, *_ in rows("Options")
        for option in words(options)
        for kind in words(kinds) or SHIPPED
    }
    declared = {(name, one.name) for name, kind in SHIPPED.items() for one in fields(kind.options)}
    assert documented == declared


def test_the_docs_have_the_defaults_of_the_cost_model() -> None:
    options = KINDS["modelled"].options()
    for names, kinds, default, _ in rows("Options"):
        if words(kinds) == {"modelled"}:
            expected = None if default == "none" else float(default)
            assert expected == getattr(options, *words(names))


def test_the_docs_have_what_kinds_can_do() -> None:
    table = DOC.split("\n## ")[0]
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    found = {min(words(name)): words(can) for name, _, can in lines}
    assert found == {name: set(kind.capabilities) for name, kind in SHIPPED.items()}


def test_the_docs_have_who_needs_a_capability() -> None:
    found = {min(words(name)): words(by) for name, _, by in rows("Capabilities")}
    assert list(found) == list(CAPABILITIES)
    for name, spec in OPERATORS.items():
        own = {part for need in spec.needs for part in need.split("|")}
        assert {capability for capability, by in found.items() if name in by} == own


def block(first_words: str) -> str:
    start = DOC.index(f"    {first_words}")
    lines = DOC[start:].splitlines()
    end = next(at for at, line in enumerate(lines) if line and not line.startswith("    "))
    return "\n".join(line[4:] for line in lines[:end]).strip()


def test_the_kind_in_the_docs_is_that_of_the_example() -> None:
    assert block("async def open_parrot") in (ROOT / "examples" / "own_engine.py").read_text()


def test_the_model_in_the_docs_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("from sagellm.runtime.engine.options"), {})
    first, last = capsys.readouterr().out.splitlines()
    assert "num_tokens=1," in first
    assert "num_tokens=99999," in last


def mistakes(**options: Any) -> list[str]:
    graph = Graph("g").engine("e", **options) >> ops.generate(engine="e")
    try:
        check_graph(graph.document, RESOLVER)
    except GraphError as error:
        return [f"{one.message} ({one.hint})" for one in error.diagnostics]
    return []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"kind": "modelled", "threads": 2},
            "`threads` is an option of kind `local` or `embedding`, and engine `e` is of kind "
            "`modelled` "
            "(drop it, or write `kind: local`)",
        ),
        (
            {"decode_step_s": 0.1},
            "`decode_step_s` is an option of kind `modelled`, and engine `e` is of kind `local` "
            "(drop it, or write `kind: modelled`)",
        ),
        ({"kind": "modeled"}, "unknown kind of engine: `modeled` (did you mean `modelled`?)"),
        ({"kind": 3}, "unknown kind of engine: `3` (there are embedding, local, modelled, openai)"),
        ({"kind": "modelled", "model": "null", "step": 1}, "`e` has no option `step`"),
    ],
)
def test_an_option_of_another_kind_is_refused(options: dict[str, Any], says: str) -> None:
    (found,) = mistakes(**options)
    assert says in found


def test_setting_a_kind_drops_what_it_does_not_have() -> None:
    graph = Graph("g").engine("e", device="cpu", threads=1, max_num_seqs=3)
    document = (graph >> ops.generate(engine="e")).document
    found = check_graph(document, RESOLVER, {}, {"e.kind": "modelled", "e.decode_step_s": 0.0})
    assert dict(found.engines["e"]) == {  # type: ignore[arg-type]
        "max_num_seqs": 3,
        "kind": "modelled",
        "decode_step_s": 0.0,
    }


def document_with(**options: Any) -> Any:
    return (Graph("g").engine("e", **options) >> ops.generate(engine="e")).document


def test_an_option_is_taken_under_its_old_name() -> None:
    for options, overrides in (
        ({"max_step_tokens": 32}, {}),
        ({}, {"e.max_step_tokens": 32}),
        ({"max_num_batched_tokens": 64}, {"e.max_step_tokens": 32}),
        ({"max_step_tokens": 64}, {"e.max_num_batched_tokens": 32}),
    ):
        found = check_graph(document_with(**options), RESOLVER, {}, overrides)
        assert engine_options(found, "e").max_num_batched_tokens == 32


def test_an_old_name_is_checked_as_the_option() -> None:
    (found,) = mistakes(max_step_tokens=1)
    assert "`max_num_batched_tokens` must be at least 2, not `1`" in found
    (found,) = mistakes(max_step_tokens=64, max_num_batched_tokens=64)
    assert "`max_step_tokens` is the old name of `max_num_batched_tokens`" in found


def test_an_old_name_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_old_name.cache_clear()
    engine_options(check_graph(document_with(max_step_tokens=64), RESOLVER), "e")
    assert "option_renamed" in caplog.text


async def test_an_engine_is_opened_as_large_as_it_was_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def with_memory(mebibytes: int) -> None:
        device = type(get_backend("cpu").device())
        monkeypatch.setattr(device, "memory_bytes", mebibytes << 20)

    document = Graph.load("joint").document
    with_memory(16)
    found = checked_graph(document, RESOLVER)
    with_memory(32)
    engine = await open_replica(found.sized, ReplicaPlace("g"))
    assert engine.facts.num_blocks == found.sizes["g"]["num_blocks"]
    assert describe_engine(found.graph, "g").sizes["num_blocks"] > engine.facts.num_blocks


def test_both_names_are_refused_whatever_else_is_overridden() -> None:
    document = document_with(max_step_tokens=64, max_num_batched_tokens=32)
    for overrides in ({}, {"e.max_num_seqs": 8}, {"e.replicas": 2}):
        with pytest.raises(GraphError, match="`max_step_tokens` is the old name of"):
            check_graph(document, RESOLVER, {}, overrides)


def test_a_wrong_value_under_the_old_name_is_found_where_it_was_given() -> None:
    with pytest.raises(GraphError) as raised:
        check_graph(document_with(), RESOLVER, {}, {"e.max_step_tokens": 1})
    (found,) = raised.value.diagnostics
    assert found.path == ("--set e.max_step_tokens=1",)
