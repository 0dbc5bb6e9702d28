"""Rules on what edges carry: item types, and KV blocks from prefill to decode."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sagellm.graphs.diagnostics import Diagnostic
from sagellm.graphs.ir import SINK, SOURCE, Edge, Node
from sagellm.graphs.rules.rule import CheckContext
from sagellm.graphs.vocabulary import ANSWER, ANY, EVENT, PREFILLED, REQUEST, OpSpec

Outlet = tuple[str, str]
ItemTypes = frozenset[str]

SAME = "same"  # an outlet that carries what arrives at the first inlet
_LEAVING: ItemTypes = frozenset({EVENT, ANSWER})  # what `sink` takes


def item_types(carries: str) -> ItemTypes:
    """The item types that a port names."""
    return frozenset(part.strip() for part in carries.split("|"))


def accepted_items(context: CheckContext) -> Iterator[Diagnostic]:
    travelling = carried_items(context)
    for number, edge in enumerate(context.graph.edges):
        given = travelling.get((edge.source, edge.outlet), frozenset())
        wanted = _wanted(context, edge)
        if ANY not in wanted | given and not given <= wanted:
            message = f"`{edge.target}` takes {_listed(wanted)}, not {_listed(given - wanted)}"
            hint = _converters(context, given, wanted)
            yield Diagnostic("wrong-item", ("edges", number, "target"), message, hint)


def carried_items(context: CheckContext) -> Mapping[Outlet, ItemTypes]:
    """What each outlet may carry, with `same` followed along the graph to a fixed point."""
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
    return arriving if ANY in wanted else arriving & wanted  # a wrong item is told once


def _wanted(context: CheckContext, edge: Edge) -> ItemTypes:
    if edge.target == SINK:
        return _LEAVING
    spec = context.spec(edge.target)
    port = spec.inlet(edge.inlet) if spec else None
    return item_types(port.carries) if port else frozenset({ANY})


def _converters(context: CheckContext, given: ItemTypes, wanted: ItemTypes) -> str:
    """A hint: ops that take what is given and give what is wanted."""
    ops = sorted(
        name
        for name, spec in context.vocabulary.items()
        if any(given <= item_types(port.carries) for port in spec.inlets)
        and any(item_types(port.carries) <= wanted for port in spec.outlets)
    )
    return f"put {' or '.join(f'`{op}`' for op in ops)} between" if ops else "rewire this edge"


def _listed(found: ItemTypes) -> str:
    return " or ".join(sorted(found))


TRANSFER = "kv_transfer"
_AGREED = {  # a fact that both engines share -> its name in a message
    "dtype": "dtype",
    "quantization": "quantization",
    "block_size": "block size",
    "num_layers": "number of layers",
    "num_kv_heads": "number of KV heads",
    "head_dim": "head dimension",
    "max_model_len": "context limit",
}


@dataclass(frozen=True, slots=True)
class KVHandoff:
    """A lease's way from one engine's operator to another's; `is_moved` by a kv_transfer."""

    giver: str
    taker: str
    from_engine: str
    to_engine: str
    is_moved: bool


def matching_engines(context: CheckContext) -> Iterator[Diagnostic]:
    """Each pair of engines once, and nothing but the model where that differs."""
    told: set[tuple[str, str]] = set()
    for handover in kv_handoffs(context):
        pair = handover.from_engine, handover.to_engine
        if pair not in told:
            told.add(pair)
            yield from _mismatches(context, handover)


def transferred_kv(context: CheckContext) -> Iterator[Diagnostic]:
    for handover in kv_handoffs(context):
        if not handover.is_moved and handover.from_engine != handover.to_engine:
            message = (
                f"`{handover.giver}` and `{handover.taker}` run on different engines,"
                " and nothing moves the KV blocks"
            )
            hint = f"put an operator with `op: {TRANSFER}` between"
            path = ("operators", handover.taker)
            yield Diagnostic("missing-transfer", path, message, hint)


def kv_handoffs(context: CheckContext) -> Iterator[KVHandoff]:
    """Every way of a lease between operators with engines, in the order of the graph."""
    for node, spec in context.specified:
        engine = context.engine_of(node, spec)
        if engine is not None and any(
            PREFILLED in item_types(port.carries) for port in spec.outlets
        ):
            yield from _handoffs_from(context, node, engine)


def _handoffs_from(context: CheckContext, giver: Node, engine: str) -> Iterator[KVHandoff]:
    seen = {(giver.name, False)}
    waiting = [(giver.name, False)]
    while waiting:
        name, is_moved = waiting.pop(0)
        for _, edge in context.forward:
            if edge.source != name or (spec := context.spec(edge.target)) is None:
                continue
            node = context.graph.node(edge.target)
            taking = context.engine_of(node, spec)
            state = node.name, is_moved or node.op == TRANSFER
            if taking is not None and _takes_leases(spec):
                yield KVHandoff(giver.name, node.name, engine, taking, is_moved)
            elif taking is None and state not in seen:
                seen.add(state)
                waiting.append(state)


def _takes_leases(spec: OpSpec) -> bool:
    return any(PREFILLED in item_types(port.carries) for port in spec.inlets)


def _mismatches(context: CheckContext, handover: KVHandoff) -> Iterator[Diagnostic]:
    p, d = handover.from_engine, handover.to_engine
    giving, taking = context.facts.engine(p), context.facts.engine(d)
    ends = f"`{handover.giver}` (engine `{p}`) and `{handover.taker}` (engine `{d}`)"
    differing = {name: words for name, words in _AGREED.items() if _differ(giving, taking, name)}
    explained = "dtype" in differing or "quantization" in differing
    if _differ(giving, taking, "model_hash") and not explained:
        hint = f"give `{p}` and `{d}` the same `model`"
        message = f"{ends} run different models"
        yield Diagnostic("pd-mismatch", ("engines", d, "model"), message, hint)
        return
    for name, words in differing.items():
        values = f"{getattr(giving, name)} and {getattr(taking, name)}"
        message = f"{ends} disagree on the {words}: {values}"
        hint = f"give `{p}` and `{d}` the same `{name}`"
        yield Diagnostic("pd-mismatch", ("engines", d, name), message, hint)


def _differ(giving: object, taking: object, name: str) -> bool:
    ours, theirs = getattr(giving, name), getattr(taking, name)
    return ours is not None and theirs is not None and bool(ours != theirs)
