"""A graph with one operator of a user's own."""

from dataclasses import replace
from typing import Any

from sagellm import Graph, ops
from sagellm.graphs.vocabulary import REQUEST, NoOptions, OpSpec, Port
from sagellm.opening.open_graph import OpenGraph
from sagellm.operators.generate import SPEC
from sagellm.runtime.operator import Build, OperatorModule
from sagellm.runtime.resolver import Resolver

NULL = {"device": "null", "model": "null"}


def own_graph(made: Any, *, subscribes: frozenset[str] = frozenset()) -> OpenGraph:
    """source -> own -> generate -> sink, where `own`, named policy_sort, is what was made."""
    ports = (Port("in", REQUEST),), (Port("out", REQUEST),)
    spec = OpSpec("own", *ports, options=NoOptions, subscribes=subscribes)
    return _opened("policy_sort", OperatorModule(spec, lambda options, setup: made))


def own_generate_graph(make: Build) -> OpenGraph:
    """source -> policy_sort -> own -> sink, where `own`, named generate, is made as generate is."""
    return _opened("generate", OperatorModule(replace(SPEC, name="own"), make))


def _opened(name: str, module: OperatorModule) -> OpenGraph:
    graph = Graph("g").engine("g", **NULL)
    document = (graph >> ops.policy_sort() >> ops.generate(engine="g")).document
    nodes = tuple(
        replace(node, op="own", attrs={} if name == "policy_sort" else node.attrs)
        if node.name == name
        else node
        for node in document.graph.nodes
    )
    return OpenGraph(
        replace(document, graph=replace(document.graph, nodes=nodes)),
        resolver=Resolver({"own": module}),
        functions={},
        overrides={},
        model=None,
        seed=0,
    )
