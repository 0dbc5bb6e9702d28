"""Rules on options: each value must have the type and range that a dataclass declares."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sagellm.graphs.diagnostics import VALUE, Diagnostic, Path, truncated
from sagellm.graphs.ir import FrozenMap, Value
from sagellm.graphs.rules.rule import CheckContext, EngineKindView, Facts, choice
from sagellm.graphs.sections import KIND, engine_kind, kind_options
from sagellm.graphs.vocabulary import SHADOW, OpSpec, nearest

_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    NoneType: "null",
    tuple: "a list",
}


def old_names(options: type) -> dict[str, str]:
    """The old names of the options of a dataclass, each with the current name. A field declares an
    old name by `metadata={"old_name": ...}`.
    """
    declared = {option.metadata.get("old_name"): option.name for option in fields(options)}
    return {old: name for old, name in declared.items() if old is not None}


def accepts(hint: Any, value: Value) -> bool:
    """Whether `value` has the type `hint`. An int counts as a float; a bool is not an int."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(accepts(part, value) for part in parts)
    if origin is Literal:
        # Types are compared too, because True == 1 in Python.
        return any(value == part and type(value) is type(part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and _items_accept(parts, value)
    if _is_mapping(hint):
        part = parts[1] if len(parts) == 2 else Any
        return isinstance(value, FrozenMap) and all(accepts(part, v) for v in value.values())
    return _plain_accepts(hint, value)


def _items_accept(parts: tuple[Any, ...], values: tuple[Value, ...]) -> bool:
    if len(parts) == 2 and parts[1] is Ellipsis:
        return all(accepts(parts[0], value) for value in values)
    pairs = zip(parts, values, strict=False)
    return len(parts) == len(values) and all(accepts(part, value) for part, value in pairs)


def _plain_accepts(hint: Any, value: Value) -> bool:
    if hint in (Any, object):
        return True
    if hint is None or hint is NoneType:
        return value is None
    if isinstance(value, bool):  # before int, of which bool is a subclass
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(hint, type) and isinstance(value, hint)


def _is_mapping(hint: Any) -> bool:
    kind = get_origin(hint) or hint
    return isinstance(kind, type) and issubclass(kind, Mapping)


def choices(hint: Any) -> tuple[str, ...]:
    """The texts that the Literals of a type allow; empty if the type has no Literal."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return tuple(map(str, parts))
    if origin in (Union, UnionType):
        return tuple(name for part in parts for name in choices(part))
    return ()


def described(hint: Any) -> str:
    """The description of a type in a message, such as "an integer or null"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(described(part) for part in parts)
    if origin is Literal:
        return ("" if len(parts) == 1 else "one of ") + ", ".join(map(shown, parts))
    if origin is tuple and parts:
        return f"a list of items, each {described(parts[0])}"
    if _is_mapping(hint):
        is_typed = len(parts) == 2 and parts[1] is not Any
        return f"a mapping, each value {described(parts[1])}" if is_typed else "a mapping"
    return _WORDS.get(NoneType if hint is None else hint, "a value")


def shown(value: object) -> str:
    """A value as a message shows it, in the words of YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "a list"
    return "a mapping" if isinstance(value, Mapping) else f"`{truncated(str(value))}`"


def operator_options(context: CheckContext) -> Iterator[Diagnostic]:
    for node, spec in context.specified:
        path: Path = ("operators", node.name)
        given: Mapping[str, Value] = node.attrs
        if spec.engine and "engine" not in spec.option_types:
            yield from _engine_reference(path, given)
            given = {name: value for name, value in given.items() if name != "engine"}
        if SHADOW in given:
            yield from _shadow_options(path, given[SHADOW], spec, context)
            given = {name: value for name, value in given.items() if name != SHADOW}
        yield from check_options(path, given, spec.options, context.facts)


def _shadow_options(
    path: Path, given: Value, spec: OpSpec, context: CheckContext
) -> Iterator[Diagnostic]:
    """Check the options of a shadow: those that differ from the operator's own."""
    path = (*path, SHADOW)
    if not spec.decides:
        ops = [one.name for one in context.vocabulary.values() if one.decides]
        message = f"`{spec.name}` decides nothing that a shadow could decide otherwise"
        hint = f"drop it; {', '.join(sorted(ops))} can have a shadow"
        yield Diagnostic("unknown-option", path, message, hint)
    elif not isinstance(given, FrozenMap) or not given:
        message = f"`{SHADOW}` must be a mapping of the options that differ, not {shown(given)}"
        hint = f"write `{SHADOW}: {{{next(iter(spec.option_types), 'option')}: ...}}`"
        yield Diagnostic("wrong-type", (*path, VALUE), message, hint)
    else:
        found = check_options(path, given, spec.options, context.facts)
        # What the shadow leaves out it has from the operator.
        yield from (one for one in found if one.code != "missing-option")


def _engine_reference(path: Path, given: Mapping[str, Value]) -> Iterator[Diagnostic]:
    if "engine" not in given:
        hint = "add `engine: NAME`"
        yield Diagnostic("missing-option", path, f"`{path[-1]}` needs an `engine`", hint)
    elif not isinstance(given["engine"], str):
        message = f"`engine` must be a text, not {shown(given['engine'])}"
        yield Diagnostic("wrong-type", (*path, "engine", VALUE), message, "name an engine")


def engine_options(context: CheckContext) -> Iterator[Diagnostic]:
    kinds = context.facts.engine_kinds
    for name, given in context.graph.engines.items():
        path: Path = ("engines", name)
        if not isinstance(given, FrozenMap):
            message = f"the options of engine `{name}` must be a mapping"
            yield Diagnostic("wrong-type", path, message, "write `{model: ...}`")
        elif kinds is not None and engine_kind(given) not in kinds:
            message = f"unknown kind of engine: {shown(given[KIND])}"
            hint = choice(given[KIND], kinds)
            yield Diagnostic("unknown-kind", (*path, KIND, VALUE), message, hint)
        elif kinds is not None:
            yield from _options_of_kind(path, given, kinds, context.facts)


def _options_of_kind(
    path: Path, given: FrozenMap, kinds: Mapping[str, EngineKindView], facts: Facts
) -> Iterator[Diagnostic]:
    kind = engine_kind(given)
    own = _names(kinds[kind])
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
    # Options of another kind are reported above, and unknown options by `check_options`.
    known = {name: value for name, value in values.items() if not foreign.get(name)}
    yield from check_options(path, known, kinds[kind].options, facts)


def _kinds_with(option: str, kinds: Mapping[str, EngineKindView]) -> list[str]:
    return [name for name, kind in kinds.items() if option in _names(kind)]


def _names(kind: EngineKindView) -> set[str]:
    """The names of the options of a kind of engine, including old names."""
    return {option.name for option in fields(kind.options)} | set(old_names(kind.options))


def _listed(kinds: list[str]) -> str:
    return " or ".join(f"`{kind}`" for kind in kinds)


def executor_options(context: CheckContext) -> Iterator[Diagnostic]:
    executor = context.graph.attrs.get("executor", FrozenMap({"kind": "tasks"}))
    kinds = context.facts.executors
    kind = executor.get("kind") if isinstance(executor, FrozenMap) else executor
    if not isinstance(executor, FrozenMap) or not isinstance(kind, str) or kind not in kinds:
        path: Path = ("executor", "kind", VALUE)
        hint = choice(kind, kinds)
        yield Diagnostic("unknown-executor", path, f"unknown kind of executor: {shown(kind)}", hint)
        return
    given = {name: value for name, value in executor.items() if name != "kind"}
    yield from check_options(("executor",), given, kinds[kind], context.facts)


def known_engines(context: CheckContext) -> Iterator[Diagnostic]:
    for node, spec in context.specified:
        name = node.attrs.get("engine")
        if spec.engine and isinstance(name, str) and name not in context.graph.engines:
            path = ("operators", node.name, "engine", VALUE)
            hint = choice(name, context.graph.engines)
            yield Diagnostic("unknown-engine", path, f"no engine is called `{name}`", hint)


def used_engines(context: CheckContext) -> Iterator[Diagnostic]:
    """Every engine must have an operator, because an unused engine would load a model in vain.

    The rule is skipped if an operator names an unknown engine, which may be a misspelt engine.
    """
    named = {context.engine_of(node, spec) for node, spec in context.specified if spec.engine}
    unspecified = any(node.op not in context.vocabulary for node in context.graph.nodes)
    if None in named or unspecified:
        return
    for name in context.graph.engines:
        if name not in named:
            hint = f"remove it, or give an operator `engine: {name}`"
            message = f"no operator uses engine `{name}`"
            yield Diagnostic("unused-engine", ("engines", name), message, hint)


def known_functions(context: CheckContext) -> Iterator[Diagnostic]:
    known = context.facts.functions
    for node, spec in context.specified:
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
    """Check the options `given` at `path` against the dataclass that declares them.

    The metadata of a field may have `min` and `max`, and `names`, a key of `facts.names`: then the
    value must be one of those names.
    """
    hints = get_type_hints(options)
    declared: dict[str, Field[Any]] = {option.name: option for option in fields(options)}
    current = old_names(options)
    for name, value in given.items():
        option_name = current.get(name, name)
        if name != option_name and option_name in given:
            message = f"`{name}` is the old name of `{option_name}`, which is given too"
            yield Diagnostic("unknown-option", (*path, name), message, "drop it")
        elif option_name in declared:
            option = declared[option_name]
            yield from _value((*path, name), value, hints[option_name], option, facts)
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
