"""The processes of a placed graph: what is in each, and what they are linked by."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sagellm.graphs.ir import Edge, FrozenMap, Graph
from sagellm.graphs.passes.place import CONTROL, PROCESSES, executor_kind, replicas_of

_TRANSFER = "kv_transfer"
_KV = "KV blocks"


@dataclass(frozen=True, slots=True)
class Process:
    """`count` processes that are alike, with the engines that compute in them."""

    name: str
    title: str
    engines: tuple[str, ...]
    count: int = 1


@dataclass(frozen=True, slots=True)
class Channel:
    """From an operator to the engine that it drives; or, with `is_kv`, between two engines.

    Engines are named as their processes are: `p`, or `p[0]` where replicas are shown one by one.
    """

    source: str
    target: str
    label: str
    is_kv: bool = False


def is_placed(graph: Graph) -> bool:
    return PROCESSES in graph.attrs


def processes(placed: Graph, *, unfold: bool = False) -> tuple[Process, ...]:
    """First the process that has the operators. `unfold`: each replica is a process of its own."""
    if executor_kind(placed) == "tasks":
        return (Process(CONTROL, "one process: executor tasks", tuple(placed.engines)),)
    control = Process(CONTROL, f"process {CONTROL}: gateway and operators", ())
    counts = replicas_of(placed)
    workers = (_workers(engine, count, unfold) for engine, count in counts.items())
    return (control, *(worker for group in workers for worker in group))


def _workers(engine: str, count: int, unfold: bool) -> tuple[Process, ...]:
    if unfold:
        names = [f"{engine}[{number}]" for number in range(count)]
        return tuple(Process(name, f"worker {name}", (engine,)) for name in names)
    times = f": x {count}" if count > 1 else ""
    return (Process(engine, f"worker {engine}{times}", (engine,), count),)


def channels(placed: Graph, *, unfold: bool = False) -> Iterator[Channel]:
    """What operators reach engines by, then what KV blocks go through from engine to engine."""
    names = {engine: (engine,) for engine in placed.engines}
    for process in processes(placed, unfold=unfold)[1:]:
        (engine,) = process.engines
        before = names[engine] if process.name != engine and names[engine] != (engine,) else ()
        names[engine] = (*before, process.name)
    for node in placed.nodes:
        for target in names.get(str(node.attrs.get("engine")), ()):
            yield Channel(node.name, target, _link(placed))
    for giver, taker in _transfers(placed):
        for source in names[giver]:
            yield from (Channel(source, target, _kv(placed), True) for target in names[taker])


def _link(placed: Graph) -> str:
    """`ipc` or `tcp`; nothing within one process."""
    return str(_executor(placed).get("address", "")).partition("://")[0]


def _kv(placed: Graph) -> str:
    transport = _executor(placed).get("kv")
    return f"{_KV}: {transport}" if transport else _KV


def _executor(graph: Graph) -> FrozenMap:
    executor = graph.attrs.get("executor")
    return executor if isinstance(executor, FrozenMap) else FrozenMap()


def _transfers(graph: Graph) -> dict[tuple[str, str], None]:
    """Pairs of engines between which an operator moves KV blocks."""
    return {
        (giver, taker): None
        for node in graph.nodes
        if node.op == _TRANSFER
        for giver in _nearest(graph, node.name, graph.inputs, lambda edge: edge.source)
        for taker in _nearest(graph, node.name, graph.outputs, lambda edge: edge.target)
        if giver != taker
    }


def _nearest(
    graph: Graph,
    name: str,
    edges: Callable[[str], tuple[Edge, ...]],
    other: Callable[[Edge], str],
) -> tuple[str, ...]:
    """The engines of the operators that come next on every way from an operator."""
    found: dict[str, None] = {}
    seen, waiting = {name}, [name]
    for at in waiting:  # grows while it is walked
        for near in (other(edge) for edge in edges(at) if not edge.feedback):
            engine = graph.node(near).attrs.get("engine") if near in graph.names else None
            if isinstance(engine, str) and engine in graph.engines:
                found[engine] = None
            elif near not in seen:
                seen.add(near)
                waiting.append(near)
    return tuple(found)
