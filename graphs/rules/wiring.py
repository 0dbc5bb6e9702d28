"""Rules on wiring: every inlet is fed, every outlet leads on, and nothing goes in circles."""

from collections.abc import Iterator

from sagellm.graphs.diagnostics import Diagnostic
from sagellm.graphs.ir import SINK, SOURCE, Edge
from sagellm.graphs.rules.subject import Subject
from sagellm.graphs.walks import reached


def source_and_sink(subject: Subject) -> Iterator[Diagnostic]:
    if not _has_source(subject):
        fed = {edge.target for _, edge in subject.forward}
        first = next((name for name in subject.graph.names if name not in fed), "...")
        message = "no edge leaves `source`: no request can enter"
        yield Diagnostic("no-source", ("edges",), message, f"write `source -> {first}`")
    if not _has_sink(subject):
        leading = {edge.source for _, edge in subject.forward}
        last = next((name for name in subject.graph.names if name not in leading), "...")
        message = "no edge reaches `sink`: no answer can leave"
        yield Diagnostic("no-sink", ("edges",), message, f"write `{last} -> sink`")


def fed_inlets(subject: Subject) -> Iterator[Diagnostic]:
    fed = {(edge.target, edge.inlet) for _, edge in subject.forward}
    wired = _wired(subject)
    for node, spec in subject.specified:
        for port in spec.inlets:
            ignored = not _has_source(subject) or node.name not in wired
            if (node.name, port.name) not in fed and not ignored:
                at = _dotted(node.name, port.name, "in")
                message = f"nothing feeds the inlet `{port.name}` of `{node.name}`"
                path = ("operators", node.name)
                yield Diagnostic("unfed-inlet", path, message, f"write `... -> {at}`")


def led_outlets(subject: Subject) -> Iterator[Diagnostic]:
    leading = {(edge.source, edge.outlet) for _, edge in subject.forward}
    wired = _wired(subject)
    for node, spec in subject.specified:
        for port in spec.outlets:
            ignored = not _has_sink(subject) or node.name not in wired
            if (node.name, port.name) not in leading and not ignored:
                at = _dotted(node.name, port.name, "out")
                message = f"the outlet `{port.name}` of `{node.name}` leads nowhere"
                path = ("operators", node.name)
                yield Diagnostic("dangling-outlet", path, message, f"write `{at} -> ...`")


def single_edges(subject: Subject) -> Iterator[Diagnostic]:
    """An item has one owner, so an outlet hands it to one inlet."""
    first: dict[tuple[str, str], Edge] = {}
    for number, edge in subject.forward:
        other = first.setdefault((edge.source, edge.outlet), edge)
        if other is not edge:
            at = _dotted(edge.source, edge.outlet, "out")
            message = f"`{at}` already leads to `{other.target}`; an item has one owner"
            hint = "remove one edge, or choose between them with an operator of two outlets"
            yield Diagnostic("second-edge", ("edges", number), message, hint)


def reachable(subject: Subject) -> Iterator[Diagnostic]:
    """Nodes without any edge, and islands; what hangs on an unfed inlet is told by that rule."""
    if not _has_source(subject):
        return
    found = reached(subject.graph, SOURCE)
    roots = set(subject.graph.names) - {edge.target for _, edge in subject.forward}
    excused = set().union(*(reached(subject.graph, root) for root in roots & _wired(subject)))
    for name in subject.graph.names:
        if name not in found | excused:
            message = f"no request ever reaches `{name}`"
            hint = f"write `... -> {name}`, or remove it"
            yield Diagnostic("unreachable", ("operators", name), message, hint)


def acyclic(subject: Subject) -> Iterator[Diagnostic]:
    """Every forward edge that closes a cycle, in the order of a depth-first walk."""
    finished: set[str] = set()
    for name in (SOURCE, *subject.graph.names):
        if name not in finished:
            yield from _closing(subject, name, finished)


def _closing(subject: Subject, start: str, finished: set[str]) -> Iterator[Diagnostic]:
    trail = [start]
    walks = [_leaving(subject, start)]
    while walks:
        number, edge = next(walks[-1], (0, None))
        if edge is None:
            finished.add(trail.pop())
            walks.pop()
        elif edge.target in trail:
            yield _cycle(number, edge, trail[trail.index(edge.target) :])
        elif edge.target not in finished:
            trail.append(edge.target)
            walks.append(_leaving(subject, edge.target))


def _leaving(subject: Subject, name: str) -> Iterator[tuple[int, Edge | None]]:
    return ((number, edge) for number, edge in subject.forward if edge.source == name)


def _cycle(number: int, edge: Edge, members: list[str]) -> Diagnostic:
    around = " -> ".join([*members, edge.target])
    hint = f"write `{edge.source} ~> {edge.target}` if this edge is feedback"
    path = ("edges", number, "target")
    return Diagnostic("cycle", path, f"a cycle without feedback: {around}", hint)


def _dotted(name: str, port: str, usual: str) -> str:
    return name if port == usual else f"{name}.{port}"


def _wired(subject: Subject) -> set[str]:
    edges = subject.graph.edges
    return {edge.source for edge in edges} | {edge.target for edge in edges}


def _has_source(subject: Subject) -> bool:
    return any(edge.source == SOURCE for _, edge in subject.forward)


def _has_sink(subject: Subject) -> bool:
    return any(edge.target == SINK for _, edge in subject.forward)
