"""The rule on what travels: an inlet takes the items that its edge carries."""

from collections.abc import Iterator, Mapping

from sagellm.graphs.diagnostics import Diagnostic
from sagellm.graphs.ir import SINK, SOURCE, Edge
from sagellm.graphs.rules.subject import Subject
from sagellm.graphs.vocabulary import ANSWER, ANY, EVENT, REQUEST, OpSpec

Outlet = tuple[str, str]
Kinds = frozenset[str]

SAME = "same"  # an outlet that carries what arrives at the first inlet
_LEAVING: Kinds = frozenset({EVENT, ANSWER})  # what `sink` takes


def kinds(carries: str) -> Kinds:
    """The item types that a port names."""
    return frozenset(part.strip() for part in carries.split("|"))


def accepted_items(subject: Subject) -> Iterator[Diagnostic]:
    travelling = carried(subject)
    for number, edge in enumerate(subject.graph.edges):
        given = travelling.get((edge.source, edge.outlet), frozenset())
        wanted = _wanted(subject, edge)
        if ANY not in wanted | given and not given <= wanted:
            message = f"`{edge.target}` takes {_listed(wanted)}, not {_listed(given - wanted)}"
            hint = _bridge(subject, given, wanted)
            yield Diagnostic("wrong-item", ("edges", number, "target"), message, hint)


def carried(subject: Subject) -> Mapping[Outlet, Kinds]:
    """What each outlet may carry, with `same` followed along the graph to a fixed point."""
    found: dict[Outlet, Kinds] = {(SOURCE, "out"): frozenset({REQUEST})}
    before = None
    while before != found:
        before = dict(found)
        for node, spec in subject.specified:
            for port in spec.outlets:
                own = kinds(port.carries)
                passed = _arriving(subject, node.name, spec, found) if SAME in own else own
                found[node.name, port.name] = (own - {SAME}) | passed
    return found


def _arriving(subject: Subject, name: str, spec: OpSpec, found: Mapping[Outlet, Kinds]) -> Kinds:
    first = spec.inlets[0].name
    edges = (edge for edge in subject.graph.inputs(name) if edge.inlet == first)
    arriving = frozenset[str]().union(
        *(found.get((edge.source, edge.outlet), frozenset()) for edge in edges)
    )
    wanted = kinds(spec.inlets[0].carries)
    return arriving if ANY in wanted else arriving & wanted  # a wrong item is told once


def _wanted(subject: Subject, edge: Edge) -> Kinds:
    if edge.target == SINK:
        return _LEAVING
    spec = subject.spec(edge.target)
    port = spec.inlet(edge.inlet) if spec else None
    return kinds(port.carries) if port else frozenset({ANY})


def _bridge(subject: Subject, given: Kinds, wanted: Kinds) -> str:
    """A hint: ops that take what is given and give what is wanted."""
    ops = sorted(
        name
        for name, spec in subject.vocabulary.items()
        if any(given <= kinds(port.carries) for port in spec.inlets)
        and any(kinds(port.carries) <= wanted for port in spec.outlets)
    )
    return f"put {' or '.join(f'`{op}`' for op in ops)} between" if ops else "rewire this edge"


def _listed(found: Kinds) -> str:
    return " or ".join(sorted(found))
