"""sagellm in SAGE pipelines: operators over graphs that this process has open."""

from sagellm.sage.embedded_graphs import (
    EmbeddedGraph,
    PipelineEvent,
    close_graphs,
    finish,
    graph_named,
    register_graph,
)
from sagellm.sage.pipeline_operators import GenerateAnswers, SubmitRequests, TokenEvents

__all__ = [
    "EmbeddedGraph",
    "GenerateAnswers",
    "PipelineEvent",
    "SubmitRequests",
    "TokenEvents",
    "close_graphs",
    "finish",
    "graph_named",
    "register_graph",
]
