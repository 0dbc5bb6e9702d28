"""place: which operators share a process, under executor `processes`."""

from dataclasses import dataclass, replace

from sagellm.graphs.ir import FrozenMap, Graph

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
