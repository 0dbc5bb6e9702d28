"""Rules on names and wiring: known operators, inlets and outlets, fed inlets, no cycles."""

from collections import Counter
from collections.abc import Iterator

from sagellm.graphs.diagnostics import VALUE, Diagnostic
from sagellm.graphs.ir import SINK, SOURCE, Edge, downstream
from sagellm.graphs.rules.rule import CheckContext, choice
from sagellm.graphs.text.surface import NAME

_ENDS = (SOURCE, SINK)
_TERMINAL = "terminal"  # the implicit outlet of every operator


def unique_nodes(context: CheckContext) -> Iterator[Diagnostic]:
    for name, count in Counter(context.graph.names).items():
        path = ("operators", name)
        if count > 1:
            message = f"{count} operators are called `{name}`"
            yield Diagnostic("duplicate-node", path, message, "give each a name of its own")
        if name in _ENDS:
            message = f"`{name}` is a port of every graph, not an operator"
            yield Diagnostic("reserved-name", path, message, "choose another name")


def known_ops(context: CheckContext) -> Iterator[Diagnostic]:
    for node in context.graph.nodes:
        if node.op not in context.vocabulary:
            path = ("operators", node.name, "op", VALUE)
            hint = choice(node.op, context.vocabulary)
            yield Diagnostic("unknown-op", path, f"unknown op `{node.op}`", hint)


def known_nodes(context: CheckContext) -> Iterator[Diagnostic]:
    """Report each unknown name once, at its first edge."""
    known = {*context.graph.names, *_ENDS}
    for number, edge in enumerate(context.graph.edges):
        for end, name in (("source", edge.source), ("target", edge.target)):
            if name not in known:
                known.add(name)
                hint = choice(name, (*_ENDS, *context.graph.names))
                message = f"no operator is called `{name}`"
                yield Diagnostic("unknown-operator", ("edges", number, end), message, hint)


def source_and_sink_directions(context: CheckContext) -> Iterator[Diagnostic]:
    for number, edge in enumerate(context.graph.edges):
        if edge.target == SOURCE:
            hint = f"write `source -> {edge.source}`, or `~>` to an operator for feedback"
            message = "nothing can feed `source`: it is where requests enter"
            yield Diagnostic("into-source", ("edges", number, "target"), message, hint)
        if edge.source == SINK:
            message = "nothing comes out of `sink`: it is where answers leave"
            hint = f"feed `{edge.target}` from an operator"
            yield Diagnostic("out-of-sink", ("edges", number, "source"), message, hint)


def listed_outlets(context: CheckContext) -> Iterator[Diagnostic]:
    """Outlets that an option lists must have valid names, each listed once."""
    for node in context.graph.nodes:
        spec = context.vocabulary.get(node.op)
        listed = spec.listed_outlets if spec else None
        names = node.attrs.get(listed.option) if listed else None
        if listed is None or not isinstance(names, tuple):
            continue
        path = ("operators", node.name, listed.option, VALUE)
        if not names:
            message = f"`{listed.option}` of `{node.name}` lists nothing; each item is an outlet"
            yield Diagnostic("bad-outlet", path, message, f"write `{listed.option}: [NAME]`")
        for name, count in Counter(name for name in names if isinstance(name, str)).items():
            if count > 1:
                message = f"`{node.name}` lists the outlet `{name}` {count} times"
                yield Diagnostic("bad-outlet", path, message, "list it once")
            elif name == _TERMINAL or not NAME.fullmatch(name):
                hint = "use letters, digits, `_` and, inside the name, `-`"
                yield Diagnostic("bad-outlet", path, f"`{name}` cannot name an outlet", hint)


def known_outlets(context: CheckContext) -> Iterator[Diagnostic]:
    for number, edge in enumerate(context.graph.edges):
        outlets = _outlets(context, edge.source)
        if outlets is not None and edge.outlet not in outlets:
            message = f"`{edge.source}` has no outlet `{edge.outlet}`"
            hint = _port_hint(edge.outlet, outlets)
            yield Diagnostic("unknown-outlet", ("edges", number, "outlet"), message, hint)


def known_inlets(context: CheckContext) -> Iterator[Diagnostic]:
    for number, edge in enumerate(context.graph.edges):
        inlets = _inlets(context, edge.target)
        if inlets is not None and edge.inlet not in inlets:
            message = f"`{edge.target}` has no inlet `{edge.inlet}`"
            hint = choice(edge.inlet, inlets)
            yield Diagnostic("unknown-inlet", ("edges", number, "inlet"), message, hint)


def _port_hint(outlet: str, outlets: tuple[str, ...]) -> str:
    if outlet == _TERMINAL:
        return "refused and failed requests reach `sink` without an edge"
    return choice(outlet, outlets)


def _outlets(context: CheckContext, name: str) -> tuple[str, ...] | None:
    if name == SOURCE:
        return ("out",)
    spec = context.spec(name)
    return tuple(port.name for port in spec.outlets) if spec else None


def _inlets(context: CheckContext, name: str) -> tuple[str, ...] | None:
    if name == SINK:
        return ("in",)
    spec = context.spec(name)
    return tuple(port.name for port in spec.inlets) if spec else None


def source_and_sink(context: CheckContext) -> Iterator[Diagnostic]:
    if not _has_source(context):
        fed = {edge.target for _, edge in context.forward}
        first = next((name for name in context.graph.names if name not in fed), "...")
        message = "no edge leaves `source`: no request can enter"
        yield Diagnostic("no-source", ("edges",), message, f"write `source -> {first}`")
    if not _has_sink(context):
        leading = {edge.source for _, edge in context.forward}
        last = next((name for name in context.graph.names if name not in leading), "...")
        message = "no edge reaches `sink`: no answer can leave"
        yield Diagnostic("no-sink", ("edges",), message, f"write `{last} -> sink`")


def fed_inlets(context: CheckContext) -> Iterator[Diagnostic]:
    fed = {(edge.target, edge.inlet) for _, edge in context.forward}
    wired = _wired(context)
    for node, spec in context.specified:
        for port in spec.inlets:
            ignored = not _has_source(context) or node.name not in wired
            if (node.name, port.name) not in fed and not ignored:
                at = _dotted(node.name, port.name, "in")
                message = f"nothing feeds the inlet `{port.name}` of `{node.name}`"
                path = ("operators", node.name)
                yield Diagnostic("unfed-inlet", path, message, f"write `... -> {at}`")


def led_outlets(context: CheckContext) -> Iterator[Diagnostic]:
    leading = {(edge.source, edge.outlet) for _, edge in context.forward}
    wired = _wired(context)
    for node, spec in context.specified:
        for port in spec.outlets:
            ignored = not _has_sink(context) or node.name not in wired
            if (node.name, port.name) not in leading and not ignored:
                at = _dotted(node.name, port.name, "out")
                message = f"the outlet `{port.name}` of `{node.name}` leads nowhere"
                path = ("operators", node.name)
                yield Diagnostic("dangling-outlet", path, message, f"write `{at} -> ...`")


def single_edges(context: CheckContext) -> Iterator[Diagnostic]:
    """An outlet must lead to one inlet only, because an item has one owner."""
    first: dict[tuple[str, str], Edge] = {}
    for number, edge in context.forward:
        other = first.setdefault((edge.source, edge.outlet), edge)
        if other is not edge:
            at = _dotted(edge.source, edge.outlet, "out")
            message = f"`{at}` already leads to `{other.target}`; an item has one owner"
            hint = "remove one edge, or choose between them with an operator of two outlets"
            yield Diagnostic("second-edge", ("edges", number), message, hint)


def reachable(context: CheckContext) -> Iterator[Diagnostic]:
    """Every node must be downstream of `source`.

    Nodes downstream of an unfed inlet are skipped, because `fed_inlets` reports the mistake.
    """
    if not _has_source(context):
        return
    found = downstream(context.graph, SOURCE)
    roots = set(context.graph.names) - {edge.target for _, edge in context.forward}
    excused = set().union(*(downstream(context.graph, root) for root in roots & _wired(context)))
    for name in context.graph.names:
        if name not in found | excused:
            message = f"no request ever reaches `{name}`"
            hint = f"write `... -> {name}`, or remove it"
            yield Diagnostic("unreachable", ("operators", name), message, hint)


def acyclic(context: CheckContext) -> Iterator[Diagnostic]:
    """Report each forward edge that closes a cycle. A depth-first walk finds these edges."""
    finished: set[str] = set()
    for name in (SOURCE, *context.graph.names):
        if name not in finished:
            yield from _closing(context, name, finished)


def _closing(context: CheckContext, start: str, finished: set[str]) -> Iterator[Diagnostic]:
    trail = [start]
    walks = [_leaving(context, start)]  # iterators, because a long graph would recurse too deeply
    while walks:
        number, edge = next(walks[-1], (0, None))
        if edge is None:
            finished.add(trail.pop())
            walks.pop()
        elif edge.target in trail:
            yield _cycle(number, edge, trail[trail.index(edge.target) :])
        elif edge.target not in finished:
            trail.append(edge.target)
            walks.append(_leaving(context, edge.target))


def _leaving(context: CheckContext, name: str) -> Iterator[tuple[int, Edge | None]]:
    return ((number, edge) for number, edge in context.forward if edge.source == name)


def _cycle(number: int, edge: Edge, members: list[str]) -> Diagnostic:
    around = " -> ".join([*members, edge.target])
    hint = f"write `{edge.source} ~> {edge.target}` if this edge is feedback"
    path = ("edges", number, "target")
    return Diagnostic("cycle", path, f"a cycle without feedback: {around}", hint)


def _dotted(name: str, port: str, usual: str) -> str:
    return name if port == usual else f"{name}.{port}"


def _wired(context: CheckContext) -> set[str]:
    edges = context.graph.edges
    return {edge.source for edge in edges} | {edge.target for edge in edges}


def _has_source(context: CheckContext) -> bool:
    return any(edge.source == SOURCE for _, edge in context.forward)


def _has_sink(context: CheckContext) -> bool:
    return any(edge.target == SINK for _, edge in context.forward)
