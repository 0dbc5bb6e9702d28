"""share_cores: engines that run side by side get threads for a part of the cores each."""

from dataclasses import dataclass, replace

from sagellm.graphs.ir import FrozenMap, Graph
from sagellm.graphs.passes.place import num_replicas


@dataclass(frozen=True, slots=True)
class ShareCores:
    """Sets the option `threads` of every engine that leaves it open: `num_cores` over the replicas
    of all engines, and at least one. More threads than cores would wait for each other in every
    kernel.
    """

    num_cores: int
    name: str = "share_cores"

    def apply(self, graph: Graph) -> Graph:
        engines = {
            name: values if isinstance(values, FrozenMap) else FrozenMap()
            for name, values in graph.engines.items()
        }
        num_workers = sum(num_replicas(values) for values in engines.values())
        threads = max(1, self.num_cores // max(num_workers, 1))
        placed = {
            name: values if values.get("threads") else FrozenMap({**values, "threads": threads})
            for name, values in engines.items()
        }
        return replace(graph, attrs=FrozenMap({**graph.attrs, "engines": FrozenMap(placed)}))
