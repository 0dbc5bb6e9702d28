"""Rules on names: every operator, op and port that is named exists, once."""

from collections import Counter
from collections.abc import Iterator

from sagellm.graphs.diagnostics import VALUE, Diagnostic
from sagellm.graphs.ir import SINK, SOURCE
from sagellm.graphs.rules.subject import Subject, choice
from sagellm.graphs.text.arrows import NAME

_ENDS = (SOURCE, SINK)
_TERMINAL = "terminal"  # the implicit outlet of every operator


def unique_nodes(subject: Subject) -> Iterator[Diagnostic]:
    for name, count in Counter(subject.graph.names).items():
        path = ("operators", name)
        if count > 1:
            message = f"{count} operators are called `{name}`"
            yield Diagnostic("duplicate-node", path, message, "give each a name of its own")
        if name in _ENDS:
            message = f"`{name}` is a port of every graph, not an operator"
            yield Diagnostic("reserved-name", path, message, "choose another name")


def known_ops(subject: Subject) -> Iterator[Diagnostic]:
    for node in subject.graph.nodes:
        if node.op not in subject.vocabulary:
            path = ("operators", node.name, "op", VALUE)
            hint = choice(node.op, subject.vocabulary)
            yield Diagnostic("unknown-op", path, f"unknown op `{node.op}`", hint)


def known_nodes(subject: Subject) -> Iterator[Diagnostic]:
    """Each unknown name once, where it first stands."""
    known = {*subject.graph.names, *_ENDS}
    for number, edge in enumerate(subject.graph.edges):
        for end, name in (("source", edge.source), ("target", edge.target)):
            if name not in known:
                known.add(name)
                hint = choice(name, (*_ENDS, *subject.graph.names))
                message = f"no operator is called `{name}`"
                yield Diagnostic("unknown-operator", ("edges", number, end), message, hint)


def directed_ends(subject: Subject) -> Iterator[Diagnostic]:
    for number, edge in enumerate(subject.graph.edges):
        if edge.target == SOURCE:
            hint = f"write `source -> {edge.source}`, or `~>` to an operator for feedback"
            message = "nothing can feed `source`: it is where requests enter"
            yield Diagnostic("into-source", ("edges", number, "target"), message, hint)
        if edge.source == SINK:
            message = "nothing comes out of `sink`: it is where answers leave"
            hint = f"feed `{edge.target}` from an operator"
            yield Diagnostic("out-of-sink", ("edges", number, "source"), message, hint)


def listed_outlets(subject: Subject) -> Iterator[Diagnostic]:
    """Outlets that an option lists have names that an edge can say, each its own."""
    for node in subject.graph.nodes:
        spec = subject.vocabulary.get(node.op)
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


def known_outlets(subject: Subject) -> Iterator[Diagnostic]:
    for number, edge in enumerate(subject.graph.edges):
        outlets = _outlets(subject, edge.source)
        if outlets is not None and edge.outlet not in outlets:
            message = f"`{edge.source}` has no outlet `{edge.outlet}`"
            hint = _port_hint(edge.outlet, outlets)
            yield Diagnostic("unknown-outlet", ("edges", number, "outlet"), message, hint)


def known_inlets(subject: Subject) -> Iterator[Diagnostic]:
    for number, edge in enumerate(subject.graph.edges):
        inlets = _inlets(subject, edge.target)
        if inlets is not None and edge.inlet not in inlets:
            message = f"`{edge.target}` has no inlet `{edge.inlet}`"
            hint = choice(edge.inlet, inlets)
            yield Diagnostic("unknown-inlet", ("edges", number, "inlet"), message, hint)


def _port_hint(outlet: str, outlets: tuple[str, ...]) -> str:
    if outlet == _TERMINAL:
        return "refused and failed requests reach `sink` without an edge"
    return choice(outlet, outlets)


def _outlets(subject: Subject, name: str) -> tuple[str, ...] | None:
    if name == SOURCE:
        return ("out",)
    spec = subject.spec(name)
    return tuple(port.name for port in spec.outlets) if spec else None


def _inlets(subject: Subject, name: str) -> tuple[str, ...] | None:
    if name == SINK:
        return ("in",)
    spec = subject.spec(name)
    return tuple(port.name for port in spec.inlets) if spec else None
