"""Rules on the items of edges: their types, and KV blocks that go from prefill to decode."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sagellm.graphs.diagnostics import Diagnostic
from sagellm.graphs.ir import SINK, SOURCE, Edge, Node
from sagellm.graphs.rules.rule import CheckContext
from sagellm.graphs.vocabulary import (
    ANSWER,
    ANY,
    EMBEDDING,
    EVENT,
    PREFILLED,
    REQUEST,
    OpSpec,
    Port,
)

Outlet = tuple[str, str]
ItemTypes = frozenset[str]

SAME = "same"  # an outlet that carries the item types of the first inlet
_SINK_TYPES: ItemTypes = frozenset({EVENT, ANSWER, EMBEDDING})
TRANSFER = "kv_transfer"
_AGREED = {  # each fact that must be equal on prefill and decode engine -> its name in messages
    "dtype": "dtype",
    "quantization": "quantization",
    "kv_cache_dtype": "KV cache dtype",
    "block_size": "block size",
    "num_layers": "number of layers",
    "num_kv_heads": "number of KV heads",
    "head_dim": "head dimension",
    "max_model_len": "context limit",
}


def item_types(carries: str) -> ItemTypes:
    """The item types that an inlet or outlet `carries`."""
    return frozenset(part.strip() for part in carries.split("|"))


def accepted_items(context: CheckContext) -> Iterator[Diagnostic]:
    carried = carried_items(context)
    for number, edge in enumerate(context.graph.edges):
        given = carried.get((edge.source, edge.outlet), frozenset())
        wanted = _wanted(context, edge)
        if ANY not in wanted | given and not given <= wanted:
            message = f"`{edge.target}` takes {_listed(wanted)}, not {_listed(given - wanted)}"
            hint = _converters(context, given, wanted)
            yield Diagnostic("wrong-item", ("edges", number, "target"), message, hint)


def carried_items(context: CheckContext) -> Mapping[Outlet, ItemTypes]:
    """The item types that each outlet carries. `same` outlets pass types on, to a fixed point."""
    found: dict[Outlet, ItemTypes] = {(SOURCE, "out"): frozenset({REQUEST})}
    before = None
    while before != found:
        before = dict(found)
        for node, spec in context.specified:
            for port in spec.outlets:
                own = item_types(port.carries)
                passed = _arriving(context, node.name, spec, found) if SAME in own else own
                found[node.name, port.name] = (own - {SAME}) | passed
    return found


def _arriving(
    context: CheckContext, name: str, spec: OpSpec, found: Mapping[Outlet, ItemTypes]
) -> ItemTypes:
    first = spec.inlets[0].name
    edges = (edge for edge in context.graph.inputs(name) if edge.inlet == first)
    arriving = frozenset[str]().union(
        *(found.get((edge.source, edge.outlet), frozenset()) for edge in edges)
    )
    wanted = item_types(spec.inlets[0].carries)
    # A wrong item type is dropped here, because it would be reported again further downstream.
    return arriving if ANY in wanted else arriving & wanted


def _wanted(context: CheckContext, edge: Edge) -> ItemTypes:
    if edge.target == SINK:
        return _SINK_TYPES
    spec = context.spec(edge.target)
    port = spec.inlet(edge.inlet) if spec else None
    return item_types(port.carries) if port else frozenset({ANY})


def _converters(context: CheckContext, given: ItemTypes, wanted: ItemTypes) -> str:
    """A hint: the ops that convert the `given` item types to `wanted` ones."""
    ops = sorted(
        name
        for name, spec in context.vocabulary.items()
        if any(given <= item_types(port.carries) for port in spec.inlets)
        and any(item_types(port.carries) <= wanted for port in spec.outlets)
    )
    return f"put {' or '.join(f'`{op}`' for op in ops)} between" if ops else "rewire this edge"


def _listed(found: ItemTypes) -> str:
    return " or ".join(sorted(found))


@dataclass(frozen=True, slots=True)
class KVHandoff:
    """A path of a KV lease between two operators with engines.

    `is_moved`: a `kv_transfer` on the path moves the KV blocks.
    """

    sender: str
    receiver: str
    from_engine: str
    to_engine: str
    is_moved: bool


def matching_engines(context: CheckContext) -> Iterator[Diagnostic]:
    """A prefill engine and its decode engine must agree on model, dtype and KV layout.

    Each pair of engines is reported once. If the models differ, no further fact is reported.
    """
    checked: set[tuple[str, str]] = set()
    for handoff in kv_handoffs(context):
        pair = handoff.from_engine, handoff.to_engine
        if pair not in checked:
            checked.add(pair)
            yield from _mismatches(context, handoff)


def transferred_kv(context: CheckContext) -> Iterator[Diagnostic]:
    """A `kv_transfer` must move each KV lease that goes to another engine."""
    for handoff in kv_handoffs(context):
        if not handoff.is_moved and handoff.from_engine != handoff.to_engine:
            message = (
                f"`{handoff.sender}` and `{handoff.receiver}` run on different engines,"
                " and nothing moves the KV blocks"
            )
            hint = f"put an operator with `op: {TRANSFER}` between"
            path = ("operators", handoff.receiver)
            yield Diagnostic("missing-transfer", path, message, hint)


def kv_handoffs(context: CheckContext) -> Iterator[KVHandoff]:
    """Every path of a KV lease between operators with engines, in the order of the graph."""
    for node, spec in context.specified:
        engine = context.engine_of(node, spec)
        if engine is not None and _carry_leases(spec.outlets):
            yield from _handoffs_from(context, node, engine)


def _handoffs_from(context: CheckContext, sender: Node, engine: str) -> Iterator[KVHandoff]:
    """The handoffs from `sender`: a breadth-first walk through operators without an engine.

    A node is visited twice if one path to it has a `kv_transfer` and another path has none.
    """
    visited = {(sender.name, False)}
    waiting = [(sender.name, False)]
    while waiting:
        name, is_moved = waiting.pop(0)
        for _, edge in context.forward:
            if edge.source != name or (spec := context.spec(edge.target)) is None:
                continue
            node = context.graph.node(edge.target)
            to_engine = context.engine_of(node, spec)
            visit = node.name, is_moved or node.op == TRANSFER
            if to_engine is not None and _carry_leases(spec.inlets):
                yield KVHandoff(sender.name, node.name, engine, to_engine, is_moved)
            elif to_engine is None and visit not in visited:
                visited.add(visit)
                waiting.append(visit)


def _carry_leases(ports: tuple[Port, ...]) -> bool:
    return any(PREFILLED in item_types(port.carries) for port in ports)


def _mismatches(context: CheckContext, handoff: KVHandoff) -> Iterator[Diagnostic]:
    p, d = handoff.from_engine, handoff.to_engine
    sending, receiving = context.facts.engine(p), context.facts.engine(d)
    ends = f"`{handoff.sender}` (engine `{p}`) and `{handoff.receiver}` (engine `{d}`)"
    differing = {
        name: words for name, words in _AGREED.items() if _differ(sending, receiving, name)
    }
    # A different dtype or quantization explains why the hashes differ.
    explained = "dtype" in differing or "quantization" in differing
    if _differ(sending, receiving, "model_hash") and not explained:
        hint = f"give `{p}` and `{d}` the same `model`"
        message = f"{ends} run different models"
        yield Diagnostic("pd-mismatch", ("engines", d, "model"), message, hint)
        return
    for name, words in differing.items():
        values = f"{getattr(sending, name)} and {getattr(receiving, name)}"
        message = f"{ends} disagree on the {words}: {values}"
        hint = f"give `{p}` and `{d}` the same `{name}`"
        yield Diagnostic("pd-mismatch", ("engines", d, name), message, hint)


def _differ(sending: object, receiving: object, name: str) -> bool:
    """Whether the fact `name` is known of both engines and differs."""
    ours, theirs = getattr(sending, name), getattr(receiving, name)
    return ours is not None and theirs is not None and bool(ours != theirs)
