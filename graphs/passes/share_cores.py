"""share_cores: engines that run side by side get threads for a part of the cores each."""

from dataclasses import dataclass, replace

from sagellm.graphs.ir import FrozenMap, Graph, Value
from sagellm.graphs.passes.place import num_replicas


@dataclass(frozen=True, slots=True)
class ShareCores:
    """Sets the option `threads` of those `engines` that leave it open: `num_cores` over all their
    replicas, and at least one. More threads than cores would wait for each other in every kernel.
    `engines`: those that compute with threads of this machine.
    """

    num_cores: int
    engines: tuple[str, ...]
    name: str = "share_cores"

    def apply(self, graph: Graph) -> Graph:
        engines = {name: graph.engines[name] for name in self.engines}
        num_workers = sum(num_replicas(values) for values in engines.values())
        threads = max(1, self.num_cores // max(num_workers, 1))
        shared = {name: _with_threads(values, threads) for name, values in engines.items()}
        placed = FrozenMap({**graph.engines, **shared})
        return replace(graph, attrs=FrozenMap({**graph.attrs, "engines": placed}))


def _with_threads(values: Value, threads: int) -> FrozenMap:
    given = values if isinstance(values, FrozenMap) else FrozenMap()
    return given if given.get("threads") else FrozenMap({**given, "threads": threads})
