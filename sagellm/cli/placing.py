"""Which processes a graph would run in: pass `place`, with the executor's options spelled out."""

from dataclasses import asdict, replace

from sagellm.graphs.check import Facts, locate
from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.ir import FrozenMap, Graph, freeze
from sagellm.graphs.passes.placement import Place
from sagellm.graphs.rules.option_types import executor_options
from sagellm.graphs.rules.rule import CheckContext
from sagellm.graphs.text.yaml import Document
from sagellm.graphs.vocabulary import Vocabulary
from sagellm.runtime.cluster.executor_options import EXECUTORS, processes_options
from sagellm.runtime.kv.transports import TRANSPORTS

_LINKS = ("address", "kv")  # what pictures show of the executor's options, given or not


def check_executor(graph: Graph, document: Document) -> None:
    """Raise GraphError for an executor or an option of it that there is not."""
    facts = Facts(executors=EXECUTORS, names={"transports": TRANSPORTS})
    found = tuple(executor_options(CheckContext(graph, Vocabulary({}), facts)))
    if found:
        raise GraphError(locate(found, document.positions))


def placed(graph: Graph) -> Graph:
    """The graph after pass `place`, its executor free of mistakes."""
    options = processes_options(graph)
    if options is not None:
        links = {name: freeze(asdict(options)[name]) for name in _LINKS}
        given = graph.attrs["executor"]
        assert isinstance(given, FrozenMap)
        executor = FrozenMap({**given, **links})
        graph = replace(graph, attrs=FrozenMap({**graph.attrs, "executor": executor}))
    return Place().apply(graph)
