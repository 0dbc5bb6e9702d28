"""Checks a stream graph before anything is loaded or started."""

from collections.abc import Iterable, Iterator
from itertools import chain

from sagellm.graphs.diagnostics import Diagnostic, locate
from sagellm.graphs.ir import Graph
from sagellm.graphs.rules import dataflow, deployment, option_types, structure
from sagellm.graphs.rules.rule import CheckContext, EngineFactsView, EngineKindView, Facts, Rule
from sagellm.graphs.vocabulary import Vocabulary

__all__ = ["EngineFactsView", "EngineKindView", "Facts", "check", "locate"]

NAMES: tuple[Rule, ...] = (
    structure.unique_nodes,
    structure.known_ops,
    structure.known_nodes,
    structure.source_and_sink_directions,
    structure.listed_outlets,
    structure.known_outlets,
    structure.known_inlets,
)
OPTIONS: tuple[Rule, ...] = (
    option_types.operator_options,
    option_types.engine_options,
    option_types.executor_options,
    option_types.known_engines,
    option_types.used_engines,
    option_types.known_functions,
    deployment.model_options,
    deployment.known_tasks,
    deployment.unique_model_names,
    deployment.capabilities,
    deployment.memory,
)
WIRING: tuple[Rule, ...] = (
    structure.source_and_sink,
    structure.fed_inlets,
    structure.led_outlets,
    structure.single_edges,
    structure.reachable,
    structure.acyclic,
)
MEANING: tuple[Rule, ...] = (
    deployment.routed_models,
    deployment.models_with_engines,
    dataflow.accepted_items,
    dataflow.matching_engines,
    dataflow.transferred_kv,
    deployment.routed_replicas,
)


def check(graph: Graph, vocabulary: Vocabulary, facts: Facts) -> tuple[Diagnostic, ...]:
    """Every mistake in a stream graph; pure. `locate` adds the places in a text.

    One mistake gives one diagnostic: wiring is judged once all names are known, and what travels
    along it once it is whole. Raises ValueError for a graph of another dialect.
    """
    if graph.dialect != "stream":
        raise ValueError(f"a stream graph is checked here, not a {graph.dialect} graph")
    context = CheckContext(graph, vocabulary, facts)
    misnamed = _apply(NAMES, context)
    found = [*misnamed, *_apply(OPTIONS, context)]
    if not misnamed:
        miswired = _apply(WIRING, context)
        found += miswired or _apply(MEANING, context)
    return tuple(found)


def _apply(rules: Iterable[Rule], context: CheckContext) -> list[Diagnostic]:
    found: Iterator[Diagnostic] = chain.from_iterable(rule(context) for rule in rules)
    return list(found)
