"""Placement passes: the process of each operator and engine, the threads of engines, the place of
each layer in KV blocks, and the kernel graphs of engines.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sagellm.graphs.ir import FrozenMap, Graph, Node, Value
from sagellm.graphs.kernels.memory_layout import KVBlocks
from sagellm.graphs.sections import executor_kind, most_replicas, num_replicas

CONTROL = "graph"  # the process that opened the graph, with the operators, source and sink
PROCESSES = "processes"  # the attribute that `Place` sets


@dataclass(frozen=True, slots=True)
class Place:
    """Set the attribute `processes`: the operators of each process, by the process's name.

    All operators run in the process `graph`, including those that drive engines, so that the tokens
    of a step pass through them in one iteration of its event loop. Each replica of an engine
    (`d[0]`) has its own process, which is listed with the operators that use the engine. The
    executor `tasks` has one process only.
    """

    name: str = "place"

    def apply(self, graph: Graph) -> Graph:
        processes = {CONTROL: graph.names}
        workers = {} if executor_kind(graph) == "tasks" else graph.engines
        for engine, values in workers.items():
            users = tuple(node.name for node in graph.nodes if node.attrs.get("engine") == engine)
            for replica in range(num_replicas(values)):
                processes[worker_name(engine, replica)] = users
        return replace(graph, attrs=FrozenMap({**graph.attrs, PROCESSES: FrozenMap(processes)}))


def worker_name(engine: str, replica: int) -> str:
    """The name of the process that runs one replica of an engine."""
    return f"{engine}[{replica}]"


def replicas_of(placed: Graph) -> dict[str, int]:
    """The number of worker processes of each engine in a placed graph."""
    processes = placed.attrs[PROCESSES]
    assert isinstance(processes, FrozenMap)
    return {
        engine: sum(worker_name(engine, n) in processes for n in range(num_replicas(values)))
        for engine, values in placed.engines.items()
    }


@dataclass(frozen=True, slots=True)
class ShareCores:
    """Set the option `threads` of the engines that lack it: an equal share of `num_cores` for each
    replica that there may be, at least 1.

    `engines`: the engines that compute with threads of this machine. With more threads than cores,
    the threads of a kernel would wait for each other.
    """

    num_cores: int
    engines: tuple[str, ...]
    name: str = "share_cores"

    def apply(self, graph: Graph) -> Graph:
        engines = {name: graph.engines[name] for name in self.engines}
        num_workers = sum(most_replicas(graph, name) for name in engines)
        threads = max(1, self.num_cores // max(num_workers, 1))
        shared = {name: _with_threads(values, threads) for name, values in engines.items()}
        placed = FrozenMap({**graph.engines, **shared})
        return replace(graph, attrs=FrozenMap({**graph.attrs, "engines": placed}))


def _with_threads(values: Value, threads: int) -> FrozenMap:
    given = values if isinstance(values, FrozenMap) else FrozenMap()
    return given if given.get("threads") else FrozenMap({**given, "threads": threads})


_TOKENS = ("kv_write", "rope_kv_write", "paged_attention")


@dataclass(frozen=True, slots=True)
class PlaceLayers:
    """Set, for each kernel that uses the KV pool, its layer within a block, and its block table or
    the blocks of its state.

    Before the pass, the option `layer` is a layer of the model; after it, a layer of a block.
    """

    blocks: KVBlocks
    name: str = "place_layers"

    def apply(self, graph: Graph) -> Graph:
        return replace(graph, nodes=tuple(map(self._placed, graph.nodes)))

    def _placed(self, node: Node) -> Node:
        layer = node.attrs.get("layer")
        if not isinstance(layer, int):
            return node
        row = self.blocks.row(layer)
        if node.op in _TOKENS:
            table = self.blocks.table(layer)
            return node.with_attrs(layer=row, **({"table": table} if table else {}))
        parts = self.blocks.state_blocks(layer)
        return node.with_attrs(layer=row, first_block=parts.start, num_blocks=len(parts))


@dataclass(frozen=True, slots=True)
class AttachBodies:
    """Attach to each operator with an engine the kernel graph that the engine runs, as its body.

    `bodies`: the kernel graph of each engine, by name. Operators of one engine share a body. The
    hash of the graph changes.
    """

    bodies: Mapping[str, Graph] = field(default_factory=dict)
    name: str = "attach_bodies"

    def apply(self, graph: Graph) -> Graph:
        nodes = tuple(
            replace(node, body=self.bodies.get(str(node.attrs.get("engine")), node.body))
            for node in graph.nodes
        )
        return replace(graph, nodes=nodes)
