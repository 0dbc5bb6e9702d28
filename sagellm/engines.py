"""Opens the engines of a checked graph."""

from collections.abc import Mapping, Sequence
from typing import Any

from sagellm.graphs.ir import FrozenMap, Graph
from sagellm.runtime.engine.opening import open_null
from sagellm.runtime.engine.options import EngineOptions
from sagellm.runtime.engine.port import Engine
from sagellm.runtime.options import read_options
from sagellm.session import Encoder, RequestError


class NoText:
    """The encoder of a graph whose engines have no tokenizer."""

    def encode(self, text: str) -> Sequence[int]:
        raise RequestError("this graph's engines have no tokenizer; give token ids")

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[int]:
        raise RequestError("this graph's engines have no chat template; give token ids")


async def open_engines(graph: Graph) -> tuple[dict[str, tuple[Engine, ...]], Encoder]:
    """Every replica of every engine, and the tokenizer of the first that has one."""
    engines: dict[str, tuple[Engine, ...]] = {}
    for name, values in graph.engines.items():
        options = read_options(EngineOptions, values if isinstance(values, FrozenMap) else {})
        engines[name] = tuple(
            open_null(options, name=name, replica=replica) for replica in range(options.replicas)
        )
    return engines, NoText()
