"""Rules on disaggregation: a prefill and the decode that continues it fit each other."""

from collections.abc import Iterator
from dataclasses import dataclass

from sagellm.graphs.diagnostics import Diagnostic
from sagellm.graphs.ir import Node
from sagellm.graphs.rules.items import kinds
from sagellm.graphs.rules.subject import Subject
from sagellm.graphs.vocabulary import PREFILLED, OpSpec

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
class Handover:
    """A lease's way from one engine's operator to another's; `is_moved` by a kv_transfer."""

    giver: str
    taker: str
    from_engine: str
    to_engine: str
    is_moved: bool


def agreement(subject: Subject) -> Iterator[Diagnostic]:
    """Each pair of engines once, and nothing but the model where that differs."""
    told: set[tuple[str, str]] = set()
    for handover in handovers(subject):
        pair = handover.from_engine, handover.to_engine
        if pair not in told:
            told.add(pair)
            yield from _disagreements(subject, handover)


def transferred(subject: Subject) -> Iterator[Diagnostic]:
    for handover in handovers(subject):
        if not handover.is_moved and handover.from_engine != handover.to_engine:
            message = (
                f"`{handover.giver}` and `{handover.taker}` run on different engines,"
                " and nothing moves the KV blocks"
            )
            hint = f"put an operator with `op: {TRANSFER}` between"
            path = ("operators", handover.taker)
            yield Diagnostic("missing-transfer", path, message, hint)


def handovers(subject: Subject) -> Iterator[Handover]:
    """Every way of a lease between operators with engines, in the order of the graph."""
    for node, spec in subject.specified:
        engine = subject.engine_of(node, spec)
        if engine is not None and any(PREFILLED in kinds(port.carries) for port in spec.outlets):
            yield from _followed(subject, node, engine)


def _followed(subject: Subject, giver: Node, engine: str) -> Iterator[Handover]:
    seen = {(giver.name, False)}
    waiting = [(giver.name, False)]
    while waiting:
        name, is_moved = waiting.pop(0)
        for _, edge in subject.forward:
            if edge.source != name or (spec := subject.spec(edge.target)) is None:
                continue
            node = subject.graph.node(edge.target)
            taking = subject.engine_of(node, spec)
            state = node.name, is_moved or node.op == TRANSFER
            if taking is not None and _takes_leases(spec):
                yield Handover(giver.name, node.name, engine, taking, is_moved)
            elif taking is None and state not in seen:
                seen.add(state)
                waiting.append(state)


def _takes_leases(spec: OpSpec) -> bool:
    return any(PREFILLED in kinds(port.carries) for port in spec.inlets)


def _disagreements(subject: Subject, handover: Handover) -> Iterator[Diagnostic]:
    p, d = handover.from_engine, handover.to_engine
    giving, taking = subject.facts.engine(p), subject.facts.engine(d)
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
