"""Rules on options: of operators, engines and the executor, as their dataclasses declare them."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints

from sagellm.graphs.diagnostics import VALUE, Diagnostic, Path
from sagellm.graphs.engines import KIND, engine_kind, kind_options
from sagellm.graphs.facts import EngineKindView, Facts
from sagellm.graphs.ir import FrozenMap, Value
from sagellm.graphs.rules.option_types import accepts, choices, described, shown
from sagellm.graphs.rules.subject import Subject, choice
from sagellm.graphs.vocabulary import nearest


def operator_options(subject: Subject) -> Iterator[Diagnostic]:
    for node, spec in subject.specified:
        path: Path = ("operators", node.name)
        given: Mapping[str, Value] = node.attrs
        if spec.engine and "engine" not in spec.option_types:
            yield from _engine_reference(path, given)
            given = {name: value for name, value in given.items() if name != "engine"}
        yield from check_options(path, given, spec.options, subject.facts)


def _engine_reference(path: Path, given: Mapping[str, Value]) -> Iterator[Diagnostic]:
    if "engine" not in given:
        hint = "add `engine: NAME`"
        yield Diagnostic("missing-option", path, f"`{path[-1]}` needs an `engine`", hint)
    elif not isinstance(given["engine"], str):
        message = f"`engine` must be a text, not {shown(given['engine'])}"
        yield Diagnostic("wrong-type", (*path, "engine", VALUE), message, "name an engine")


def engine_options(subject: Subject) -> Iterator[Diagnostic]:
    kinds = subject.facts.engine_kinds
    for name, given in subject.graph.engines.items():
        path: Path = ("engines", name)
        if not isinstance(given, FrozenMap):
            message = f"the options of engine `{name}` must be a mapping"
            yield Diagnostic("wrong-type", path, message, "write `{model: ...}`")
        elif kinds is not None and engine_kind(given) not in kinds:
            message = f"unknown kind of engine: {shown(given[KIND])}"
            hint = choice(given[KIND], kinds)
            yield Diagnostic("unknown-kind", (*path, KIND, VALUE), message, hint)
        elif kinds is not None:
            yield from _options_of_kind(path, given, kinds, subject.facts)


def _options_of_kind(
    path: Path, given: FrozenMap, kinds: Mapping[str, EngineKindView], facts: Facts
) -> Iterator[Diagnostic]:
    kind = engine_kind(given)
    own = {option.name for option in fields(kinds[kind].options)}
    values = kind_options(given)
    foreign = {name: _kinds_with(name, kinds) for name in values if name not in own}
    for name, others in foreign.items():
        if others:
            message = (
                f"`{name}` is an option of kind {_listed(others)}, and engine `{path[-1]}` is of "
                f"kind `{kind}`"
            )
            hint = f"drop it, or write `kind: {others[0]}`"
            yield Diagnostic("unknown-option", (*path, name), message, hint)
    known = {name: value for name, value in values.items() if not foreign.get(name)}
    yield from check_options(path, known, kinds[kind].options, facts)


def _kinds_with(option: str, kinds: Mapping[str, EngineKindView]) -> list[str]:
    return [
        name
        for name, kind in kinds.items()
        if any(declared.name == option for declared in fields(kind.options))
    ]


def _listed(kinds: list[str]) -> str:
    return " or ".join(f"`{kind}`" for kind in kinds)


def executor_options(subject: Subject) -> Iterator[Diagnostic]:
    executor = subject.graph.attrs.get("executor", FrozenMap({"kind": "tasks"}))
    kinds = subject.facts.executors
    kind = executor.get("kind") if isinstance(executor, FrozenMap) else executor
    if not isinstance(executor, FrozenMap) or not isinstance(kind, str) or kind not in kinds:
        path: Path = ("executor", "kind", VALUE)
        hint = choice(kind, kinds)
        yield Diagnostic("unknown-executor", path, f"unknown kind of executor: {shown(kind)}", hint)
        return
    given = {name: value for name, value in executor.items() if name != "kind"}
    yield from check_options(("executor",), given, kinds[kind], subject.facts)


def known_engines(subject: Subject) -> Iterator[Diagnostic]:
    for node, spec in subject.specified:
        name = node.attrs.get("engine")
        if spec.engine and isinstance(name, str) and name not in subject.graph.engines:
            path = ("operators", node.name, "engine", VALUE)
            hint = choice(name, subject.graph.engines)
            yield Diagnostic("unknown-engine", path, f"no engine is called `{name}`", hint)


def used_engines(subject: Subject) -> Iterator[Diagnostic]:
    """An engine that nobody uses would load a model for nothing; excused by a wrong reference."""
    named = {subject.engine_of(node, spec) for node, spec in subject.specified if spec.engine}
    unspecified = any(node.op not in subject.vocabulary for node in subject.graph.nodes)
    if None in named or unspecified:
        return
    for name in subject.graph.engines:
        if name not in named:
            hint = f"remove it, or give an operator `engine: {name}`"
            message = f"no operator uses engine `{name}`"
            yield Diagnostic("unused-engine", ("engines", name), message, hint)


def known_functions(subject: Subject) -> Iterator[Diagnostic]:
    known = subject.facts.functions
    for node, spec in subject.specified:
        name = node.attrs.get("function")
        listed = known is not None and "function" in spec.option_types
        if listed and isinstance(name, str) and known is not None and name not in known:
            path = ("operators", node.name, "function", VALUE)
            message = f"no function is registered as `{name}`"
            close = nearest(name, sorted(known))
            hint = f"did you mean `{close}`? If not, {_REGISTER}" if close else _REGISTER
            yield Diagnostic("unknown-function", path, message, hint)


_REGISTER = "register it in a file of yours, and name that file by `--import` or `imports:`"


def check_options(
    path: Path, given: Mapping[str, Value], options: type, facts: Facts
) -> Iterator[Diagnostic]:
    """What is wrong with options `given` at `path` for a dataclass that declares them."""
    hints = get_type_hints(options)
    declared: dict[str, Field[Any]] = {option.name: option for option in fields(options)}
    for name, value in given.items():
        if name in declared:
            yield from _value((*path, name), value, hints[name], declared[name], facts)
        else:
            message = f"`{path[-1]}` has no option `{name}`"
            hint = choice(name, declared)
            yield Diagnostic("unknown-option", (*path, name), message, hint)
    for name, option in declared.items():
        required = option.default is MISSING and option.default_factory is MISSING
        if required and name not in given:
            hint = f"add `{name}: {described(hints[name])}`"
            yield Diagnostic("missing-option", path, f"`{path[-1]}` needs `{name}`", hint)


def _value(
    path: Path, value: Value, hint: Any, option: Field[Any], facts: Facts
) -> Iterator[Diagnostic]:
    where, name = (*path, VALUE), option.name
    if not accepts(hint, value):
        message = f"`{name}` must be {described(hint)}, not {shown(value)}"
        allowed = choices(hint)
        fix = choice(value, allowed) if allowed else f"write {described(hint)}"
        code = "wrong-value" if allowed else "wrong-type"
        yield Diagnostic(code, where, message, fix)
    elif isinstance(value, int | float) and not _in_range(value, option):
        message = f"`{name}` must be {_range(option)}, not {shown(value)}"
        yield Diagnostic("out-of-range", where, message, f"write a number {_range(option)}")
    elif isinstance(value, str) and value not in (known := _known(option, facts, value)):
        message = f"`{name}` names nothing known: {shown(value)}"
        yield Diagnostic("wrong-value", where, message, choice(value, known))


def _known(option: Field[Any], facts: Facts, value: str) -> Collection[str]:
    return facts.names.get(option.metadata.get("names", ""), frozenset({value}))


def _in_range(value: int | float, option: Field[Any]) -> bool:
    least, most = option.metadata.get("min"), option.metadata.get("max")
    return (least is None or value >= least) and (most is None or value <= most)


def _range(option: Field[Any]) -> str:
    least, most = option.metadata.get("min"), option.metadata.get("max")
    if least is not None and most is not None:
        return f"from {least} to {most}"
    return f"at least {least}" if most is None else f"at most {most}"
