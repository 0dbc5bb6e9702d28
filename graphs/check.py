"""Checks a stream graph before any engine loads, with the table of all rules."""

from sagellm.graphs.diagnostics import Diagnostic, locate
from sagellm.graphs.ir import Graph
from sagellm.graphs.rules import dataflow, deployment, option_types, structure
from sagellm.graphs.rules.rule import CheckContext, EngineFactsView, EngineKindView, Facts, Rule
from sagellm.graphs.vocabulary import Vocabulary

__all__ = ["EngineFactsView", "EngineKindView", "Facts", "check", "locate"]

# The rules by stage. `check` applies a stage only if the stages that it depends on found nothing.
RULES: dict[str, tuple[Rule, ...]] = {
    "names": (
        structure.unique_nodes,
        structure.known_ops,
        structure.known_nodes,
        structure.source_and_sink_directions,
        structure.listed_outlets,
        structure.known_outlets,
        structure.known_inlets,
    ),
    "options": (
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
        deployment.autoscaled,
        deployment.memory,
    ),
    "wiring": (
        structure.source_and_sink,
        structure.fed_inlets,
        structure.led_outlets,
        structure.single_edges,
        structure.reachable,
        structure.acyclic,
    ),
    "meaning": (
        deployment.routed_models,
        deployment.models_with_engines,
        dataflow.accepted_items,
        dataflow.matching_engines,
        dataflow.transferred_kv,
        deployment.routed_replicas,
        deployment.fixed_replicas,
        deployment.scaled_paths,
        deployment.scaled_models,
    ),
}


def check(graph: Graph, vocabulary: Vocabulary, facts: Facts) -> tuple[Diagnostic, ...]:
    """Find every mistake in a stream graph. `locate` adds the positions in a file.

    One mistake gives one diagnostic. Therefore wiring is checked only if all names are known, and
    the meaning of edges only if the wiring is complete. Raises ValueError for a kernel graph.
    """
    if graph.dialect != "stream":
        raise ValueError(f"a stream graph is checked here, not a {graph.dialect} graph")
    context = CheckContext(graph, vocabulary, facts)
    misnamed = _apply("names", context)
    found = [*misnamed, *_apply("options", context)]
    if not misnamed:
        miswired = _apply("wiring", context)
        found += miswired or _apply("meaning", context)
    return tuple(found)


def _apply(stage: str, context: CheckContext) -> list[Diagnostic]:
    return [found for rule in RULES[stage] for found in rule(context)]
