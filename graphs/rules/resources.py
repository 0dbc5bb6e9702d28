"""Rules on what engines can do and hold: capabilities, replicas and memory."""

from collections.abc import Iterator

from sagellm.graphs.diagnostics import VALUE, Diagnostic
from sagellm.graphs.engines import engine_kind
from sagellm.graphs.facts import EngineFactsView
from sagellm.graphs.ir import SOURCE, FrozenMap, Graph
from sagellm.graphs.rules.subject import Subject
from sagellm.graphs.vocabulary import lacking
from sagellm.graphs.walks import reached

ROUTE = "route"
_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def capabilities(subject: Subject) -> Iterator[Diagnostic]:
    for node, spec in subject.specified:
        engine = subject.engine_of(node, spec)
        offered = subject.facts.engine(engine).capabilities if engine else None
        if engine is None or offered is None or not (lacks := lacking(spec.needs, offered)):
            continue
        what = ", ".join(need.replace("|", " or ") for need in lacks)
        kind = engine_kind(subject.graph.engines[engine])
        message = f"`{node.name}` needs {what}, which engine `{engine}` of kind `{kind}` lacks"
        path = ("operators", node.name, "engine", VALUE)
        yield Diagnostic("missing-capability", path, message, _able(subject, spec.needs, offered))


def _able(subject: Subject, needs: frozenset[str], offered: frozenset[str]) -> str:
    """A hint: an engine of the graph that can do it, and the kinds whose engines can."""
    engines = (
        name
        for name in subject.graph.engines
        if not lacking(needs, subject.facts.engine(name).capabilities or frozenset())
    )
    kinds = [
        name
        for name, kind in (subject.facts.engine_kinds or {}).items()
        if not lacking(needs, kind.capabilities)
    ]
    fixes = [f"use engine `{name}`" for name in engines][:1]
    if kinds:
        fixes.append(f"an engine of kind {' or '.join(f'`{kind}`' for kind in kinds)} can do it")
    return "; ".join(fixes) or f"it offers {', '.join(sorted(offered)) or 'nothing'}"


def routed(subject: Subject) -> Iterator[Diagnostic]:
    unrouted = unrouted_nodes(subject.graph)
    for node, spec in subject.specified:
        engine = subject.engine_of(node, spec)
        if engine and node.name in unrouted and (count := num_replicas(subject, engine)) > 1:
            message = (
                f"engine `{engine}` has {count} replicas; nothing chooses one for `{node.name}`"
            )
            hint = f"put an operator with `op: {ROUTE}` before `{node.name}`"
            yield Diagnostic("unrouted-replicas", ("operators", node.name), message, hint)


def unrouted_nodes(graph: Graph) -> set[str]:
    """Take the routers away: what a request still reaches has none before it."""
    routers = [node.name for node in graph.nodes if node.op == ROUTE]
    return reached(graph, SOURCE, avoiding=routers)


def num_replicas(subject: Subject, engine: str) -> int:
    """How many replicas an engine has: the fact, else its option, else 1."""
    known = subject.facts.engine(engine).replicas
    options = subject.graph.engines[engine]
    told = options.get("replicas") if isinstance(options, FrozenMap) else None
    return known or (told if isinstance(told, int) else 1)


def memory(subject: Subject) -> Iterator[Diagnostic]:
    """The pools of all engines on one device fit its memory, as it was when they were sized."""
    views = {name: subject.facts.engine(name) for name in subject.graph.engines}
    for device in dict.fromkeys(view.device for view in views.values()):
        here = {name: view for name, view in views.items() if view.device == device}
        known = [view.memory_bytes for view in here.values() if view.memory_bytes is not None]
        yield from _overfull(subject, tuple(here), max(known, default=subject.facts.memory_bytes))


def _overfull(
    subject: Subject, engines: tuple[str, ...], limit: int | None
) -> Iterator[Diagnostic]:
    pools = {name: _pool_bytes(subject, name) for name in engines}
    total = sum(pools.values())
    if limit is None or total <= limit:
        return
    largest = max(pools, key=lambda name: pools[name])
    message = f"the KV pools need {_mib(total)}, and there are {_mib(limit)} of memory"
    if len(pools) > 1:
        message += f"; `{largest}` needs {_mib(pools[largest])}"
    hint = _fitting(subject, largest, limit - total + pools[largest])
    yield Diagnostic("too-much-memory", ("engines", largest), message, hint)


def _pool_bytes(subject: Subject, engine: str) -> int:
    return (subject.facts.engine(engine).kv_pool_bytes or 0) * num_replicas(subject, engine)


def _fitting(subject: Subject, engine: str, free_bytes: int) -> str:
    """A hint: how many blocks a replica could have, where the facts tell a block's size."""
    block_bytes = _block_bytes(subject.facts.engine(engine))
    if block_bytes is None or free_bytes < block_bytes:
        return "give the engines fewer KV blocks"
    num_blocks = free_bytes // (block_bytes * num_replicas(subject, engine))
    return f"{num_blocks} blocks a replica of `{engine}` would fit"


def _block_bytes(facts: EngineFactsView) -> int | None:
    factors = (facts.num_layers, facts.num_kv_heads, facts.head_dim, facts.block_size)
    size = 2 * _ITEM_BYTES.get(facts.dtype or "", 0)  # keys and values
    for factor in factors:
        size *= factor or 0
    return size or None


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
