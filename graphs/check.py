"""Checks a stream graph before anything is loaded or started."""

from collections.abc import Iterable, Iterator
from itertools import chain

from sagellm.graphs.diagnostics import Diagnostic, locate
from sagellm.graphs.facts import EngineFactsView, EngineKindView, Facts
from sagellm.graphs.ir import Graph
from sagellm.graphs.rules import compatibility, items, models, names, options, resources, wiring
from sagellm.graphs.rules.subject import Rule, Subject
from sagellm.graphs.vocabulary import Vocabulary

__all__ = ["EngineFactsView", "EngineKindView", "Facts", "check", "locate"]

NAMES: tuple[Rule, ...] = (
    names.unique_nodes,
    names.known_ops,
    names.known_nodes,
    names.directed_ends,
    names.listed_outlets,
    names.known_outlets,
    names.known_inlets,
)
OPTIONS: tuple[Rule, ...] = (
    options.operator_options,
    options.engine_options,
    options.executor_options,
    options.known_engines,
    options.used_engines,
    options.known_functions,
    models.model_options,
    models.known_tasks,
    models.own_names,
    resources.capabilities,
    resources.memory,
)
WIRING: tuple[Rule, ...] = (
    wiring.source_and_sink,
    wiring.fed_inlets,
    wiring.led_outlets,
    wiring.single_edges,
    wiring.reachable,
    wiring.acyclic,
)
MEANING: tuple[Rule, ...] = (
    models.entered,
    models.computed,
    items.accepted_items,
    compatibility.agreement,
    compatibility.transferred,
    resources.routed,
)


def check(graph: Graph, vocabulary: Vocabulary, facts: Facts) -> tuple[Diagnostic, ...]:
    """Every mistake in a stream graph; pure. `locate` adds the places in a text.

    One mistake gives one diagnostic: wiring is judged once all names are known, and what travels
    along it once it is whole. Raises ValueError for a graph of another dialect.
    """
    if graph.dialect != "stream":
        raise ValueError(f"a stream graph is checked here, not a {graph.dialect} graph")
    subject = Subject(graph, vocabulary, facts)
    misnamed = _apply(NAMES, subject)
    found = [*misnamed, *_apply(OPTIONS, subject)]
    if not misnamed:
        miswired = _apply(WIRING, subject)
        found += miswired or _apply(MEANING, subject)
    return tuple(found)


def _apply(rules: Iterable[Rule], subject: Subject) -> list[Diagnostic]:
    found: Iterator[Diagnostic] = chain.from_iterable(rule(subject) for rule in rules)
    return list(found)
