"""Placement passes: operators into processes, threads to engines, layers into blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sagellm.graphs.ir import FrozenMap, Graph, Node, Value
from sagellm.graphs.kernels.memory import KVBlocks

CONTROL = "graph"  # the process that opened the graph, and has its source and sink
PROCESSES = "processes"  # the attribute that the pass sets


@dataclass(frozen=True, slots=True)
class Place:
    """Sets the graph's attribute `processes`: the operators of each process, by its name.

    Logic operators chain into one process, with the operators that drive engines: these hand on a
    step's tokens in one turn of a loop. What computes is a process a replica of each engine
    (`d[0]`), which its operators share. Under executor `tasks` all is in one process.
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
    """Of the process that runs one replica of an engine."""
    return f"{engine}[{replica}]"


def executor_kind(graph: Graph) -> str:
    """`tasks` where the graph does not say."""
    executor = graph.attrs.get("executor")
    kind = executor.get("kind", "tasks") if isinstance(executor, FrozenMap) else executor
    return kind if isinstance(kind, str) else "tasks"


def num_replicas(values: object) -> int:
    """Of an engine with those options."""
    count = values.get("replicas", 1) if isinstance(values, FrozenMap) else 1
    return count if isinstance(count, int) else 1


def replicas_of(placed: Graph) -> dict[str, int]:
    """How many worker processes a placed graph has for each engine."""
    processes = placed.attrs[PROCESSES]
    assert isinstance(processes, FrozenMap)
    return {
        engine: sum(worker_name(engine, n) in processes for n in range(num_replicas(values)))
        for engine, values in placed.engines.items()
    }


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


_TOKENS = ("kv_write", "rope_kv_write", "paged_attention")


@dataclass(frozen=True, slots=True)
class PlaceLayers:
    """Writes into each kernel with memory the layer of its blocks, and which blocks those are.

    Before it `layer` counts the layers of the model, and there is one block table.
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
    """`bodies`: engine name -> kernel graph, built from that engine's config.json.

    Operators of one engine share one body; the result has a hash of its own.
    """

    bodies: Mapping[str, Graph] = field(default_factory=dict)
    name: str = "attach_bodies"

    def apply(self, graph: Graph) -> Graph:
        nodes = tuple(
            replace(node, body=self.bodies.get(str(node.attrs.get("engine")), node.body))
            for node in graph.nodes
        )
        return replace(graph, nodes=nodes)
