"""Checks a graph against this machine and its models' configs. Reads no weights."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sagellm.backends.interface import is_registered_here
from sagellm.graphs.check import Facts, check, locate
from sagellm.graphs.diagnostics import VALUE, Diagnostic, GraphError, Path
from sagellm.graphs.ir import FrozenMap, Graph
from sagellm.graphs.log import get_logger
from sagellm.graphs.models import UnsupportedModel
from sagellm.graphs.models import family as families
from sagellm.graphs.sections import (
    KIND,
    ROUTE_MODEL,
    ServedModel,
    engine_kind,
    served_models,
    with_most_replicas,
)
from sagellm.graphs.text.yaml import Document
from sagellm.opening.graph_engines import KindViews, describe_engine
from sagellm.opening.sources import (
    assignment,
    override,
    with_engine_options,
    with_outlet_names,
)
from sagellm.operators.policies import OWN, POLICIES, UNAVAILABLE
from sagellm.operators.routing import STRATEGIES
from sagellm.runtime.cluster.executor_options import EXECUTORS, processes_options
from sagellm.runtime.engine.kinds import KINDS, EngineDescription
from sagellm.runtime.engine.options import EngineOptionError
from sagellm.runtime.kv.transports import TRANSPORTS
from sagellm.runtime.models import FolderWarning
from sagellm.runtime.models.folder import ModelError
from sagellm.runtime.operator import Setup
from sagellm.runtime.plan import build_operators
from sagellm.runtime.registry import BrokenEntryPoint, OptionError
from sagellm.runtime.resolver import Resolver

LOG = get_logger("sagellm.models")
_NAMED = (("operators",), ("engines",), ("models",))  # sections whose keys are names


def check_graph(
    document: Document,
    resolver: Resolver,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    overrides: Mapping[str, Any] | None = None,
    model: str | None = None,
    *,
    is_simulated: bool = False,
) -> Graph:
    """Check a graph, and return it with its overrides. Raises the errors of `checked_graph`."""
    return checked_graph(
        document, resolver, functions, overrides, model, is_simulated=is_simulated
    ).graph


@dataclass(frozen=True, slots=True)
class CheckedGraph:
    """A graph that passed the checks, with its overrides.

    `sizes`: for each engine, the options that follow from the size of the memory.
    """

    graph: Graph
    sizes: Mapping[str, Mapping[str, int]]

    @property
    def sized(self) -> Graph:
        """The graph with `sizes` set as options of its engines.

        The engines then open with the sizes that were checked: memory is measured only once.
        """
        graph = self.graph
        for name, options in self.sizes.items():
            graph = with_engine_options(graph, name, options)
        return graph


def checked_graph(
    document: Document,
    resolver: Resolver,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    overrides: Mapping[str, Any] | None = None,
    model: str | None = None,
    *,
    is_simulated: bool = False,
) -> CheckedGraph:
    """Check a graph with its overrides. Raises GraphError with every mistake found.

    `is_simulated`: no executor of the graph will run it, so it needs none that can add replicas.

    `functions` None skips the check of function names: functions may be registered later. The check
    imports no module of `imports`. Models are looked up, and downloaded if necessary, only after
    the graph itself has no mistakes. Warnings about model folders are logged.
    """
    graph = override(document.graph, overrides or {}, model)
    facts = Facts(
        functions=functions,
        engine_kinds=KindViews(),
        executors=EXECUTORS,
        names={
            "policies": _RegistryNames(POLICIES, OWN, unavailable=UNAVAILABLE),
            "strategies": STRATEGIES,
            "transports": TRANSPORTS,
        },
        is_simulated=is_simulated,
    )
    engines: dict[str, EngineDescription] = {}
    _load_operators(document, graph, resolver)
    graph = with_outlet_names(graph, resolver.vocabulary)
    found = check(graph, resolver.vocabulary, facts)
    if not found:  # describing an engine may download its model, so wrong graphs end here
        given = _given_models(graph, overrides or {}, model)
        widest = with_most_replicas(graph)  # the pools of all replicas must fit into the memory
        looked = {
            name: _describe_or_diagnose(name, widest, given.get(name, "")) for name in graph.engines
        }
        engines = {name: one for name, one in looked.items() if isinstance(one, EngineDescription)}
        mistaken = [one for one in looked.values() if isinstance(one, Diagnostic)]
        found = tuple(dict.fromkeys(mistaken))  # engines of one model report one mistake once
        views = {name: engine.view for name, engine in engines.items()}
        # Repeat the check with the facts of the engines: sizes, roles, KV layouts.
        found += check(graph, resolver.vocabulary, replace(facts, engines=views))
        found += _mixed_tokenizers(graph, engines)
        log_warnings(warning for engine in engines.values() for warning in engine.warnings)
    if not found:
        found = _mistaken_executor(graph)
        found += _kinds_of_this_process(graph) + _backends_of_this_process(graph)
        found += _families_of_this_process(graph, engines)
    if not found:
        found = _unbuildable(graph, resolver, functions)
    if found:
        raise GraphError(locate(_as_given(found, overrides or {}), document.positions))
    return CheckedGraph(graph, {name: engine.sizes for name, engine in engines.items()})


def _as_given(found: Iterable[Diagnostic], overrides: Mapping[str, Any]) -> list[Diagnostic]:
    """The mistakes; one in an override has the override as its place, not a place in the file."""
    return [replace(one, path=_path_as_given(one, overrides)) for one in found]


def _path_as_given(found: Diagnostic, overrides: Mapping[str, Any]) -> Path:
    """The path of a mistake: in the graph, or the command line option with the wrong override."""
    kind, *names = found.path if found.path[:1] in _NAMED else (None, *found.path)
    target = ".".join(str(name) for name in names[:2])
    if kind == "engines" and len(names) == 1:  # options of the engine contradict: name one given
        named = (one for one in overrides if one.startswith(f"{target}."))
        target = next((one for one in named if one.partition(".")[2] in found.message), "")
    if target not in overrides:
        return found.path
    if target == "executor.kind":
        return (f"--executor {overrides[target]}",)
    return (assignment(target, overrides[target]),)


class _RegistryNames(Collection[str]):
    """The names of a registry, and the name `more`.

    A set of names would read the entry points of all packages at once. A lookup here reads them
    only for a name that is not built in. `unavailable`: names that building refuses, with a reason.
    They pass a lookup, and are not among the names that a message suggests.
    """

    def __init__(
        self, known: Collection[str], more: str, *, unavailable: Collection[str] = ()
    ) -> None:
        self._known, self._more, self._unavailable = known, more, unavailable

    def __contains__(self, name: object) -> bool:
        return name == self._more or name in self._unavailable or name in self._known

    def __iter__(self) -> Iterator[str]:
        yield from (*self._known, self._more)

    def __len__(self) -> int:
        return len(self._known) + 1


def _load_operators(document: Document, graph: Graph, resolver: Resolver) -> None:
    """Load the operators of a graph. Raises a GraphError that names all that fail to load."""
    found = []
    for node in graph.nodes:
        try:
            resolver.vocabulary.get(node.op)  # imports the op's entry point
        except BrokenEntryPoint as error:
            path = ("operators", node.name, "op", VALUE)
            hint = "fix or remove that package"
            found.append(Diagnostic("broken-entry-point", path, str(error), hint))
    if found:
        raise GraphError(locate(found, document.positions))


def _mistaken_executor(graph: Graph) -> tuple[Diagnostic, ...]:
    """A diagnostic for each option of the executor that contradicts another one."""
    options = processes_options(graph)
    return tuple(
        Diagnostic("bad-options", ("executor", option), f"{option}: {message}", hint)
        for option, message, hint in (options.mistakes() if options is not None else ())
    )


def _kinds_of_this_process(graph: Graph) -> tuple[Diagnostic, ...]:
    """Diagnostics for kinds that only this process knows: workers import no code of the user."""
    if processes_options(graph) is None:
        return ()
    kinds = {name: engine_kind(values) for name, values in graph.engines.items()}
    return tuple(
        Diagnostic(
            "bad-engine",
            ("engines", name, KIND, VALUE),
            f"kind `{kind}` is registered in this process, and worker processes do not know it",
            "install it as a package with an entry point `sagellm.engines`, or use `kind: tasks` "
            "of the executor",
        )
        for name, kind in kinds.items()
        if KINDS.is_registered_here(kind)
    )


def _backends_of_this_process(graph: Graph) -> tuple[Diagnostic, ...]:
    """Diagnostics for backends that only this process knows: workers import no user's code."""
    if processes_options(graph) is None:
        return ()
    devices = {
        name: str(values.get("device", ""))
        for name, values in graph.engines.items()
        if isinstance(values, FrozenMap)
    }
    return tuple(
        Diagnostic(
            "bad-engine",
            ("engines", name, "device", VALUE),
            f"backend `{device}` is registered in this process; worker processes do not know it",
            "install it as a package with an entry point `sagellm.backends`, or use `kind: tasks` "
            "of the executor",
        )
        for name, device in devices.items()
        if is_registered_here(device.partition(":")[0])
    )


def _families_of_this_process(
    graph: Graph, engines: Mapping[str, EngineDescription]
) -> tuple[Diagnostic, ...]:
    """Diagnostics for model families that only this process knows: workers run no user code."""
    if processes_options(graph) is None:
        return ()
    folders = {name: engine.folder for name, engine in engines.items() if engine.folder is not None}
    architectures = {
        name: families.architecture_of(folder.config) for name, folder in folders.items()
    }
    return tuple(
        Diagnostic(
            "bad-engine",
            ("engines", name, "model", VALUE),
            f"the model family of `{architecture}` is registered in this process; worker processes "
            "do not know it",
            "install it as a package with an entry point `sagellm.model_families`, or use "
            "`kind: tasks` of the executor",
        )
        for name, architecture in architectures.items()
        if families.is_registered_here(architecture)
    )


class _AnyFunction(dict[str, Callable[..., Any]]):
    """A mapping that has a function under every name, for functions that are registered later."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Callable[..., Any]:
        return lambda item: item


def _unbuildable(
    graph: Graph, resolver: Resolver, functions: Mapping[str, Callable[..., Any]] | None
) -> tuple[Diagnostic, ...]:
    """Diagnostics for contradictory options of operators, which only building them finds."""
    replicas = dict.fromkeys(graph.names, 1)
    known = _AnyFunction() if functions is None else functions
    try:
        build_operators(graph, resolver, replicas, Setup("", functions=known))
    except GraphError as error:
        return error.diagnostics
    return ()


def log_warnings(warnings: Iterable[FolderWarning]) -> None:
    """Log warnings about model folders, each one once."""
    for warning in dict.fromkeys(warnings):
        LOG.warning(warning.event, model=warning.model, cause=warning.cause, fix=warning.fix)


def _mixed_tokenizers(
    graph: Graph, engines: Mapping[str, EngineDescription]
) -> tuple[Diagnostic, ...]:
    """Diagnostics for engines of one model whose tokenizers give a text different token ids."""
    found = (_mixed(served, engines) for served in served_models(graph))
    return tuple(one for one in found if one is not None)


def _mixed(served: ServedModel, engines: Mapping[str, EngineDescription]) -> Diagnostic | None:
    seen: dict[str, str] = {}
    for name in served.engines:
        if name in engines:
            seen.setdefault(_tokenizer_hash(engines[name]), name)
    if len(seen) < 2:
        return None
    first, other, *_ = seen.values()
    message = f"engines {first} and {other} have different tokenizers"
    hint = (
        "a request is encoded once: give them models of one family, "
        f"or an outlet each of an operator with `op: {ROUTE_MODEL}`"
    )
    return Diagnostic("mixed-tokenizers", ("engines", other), message, hint)


def _tokenizer_hash(engine: EngineDescription) -> str:
    """The hash of an engine's tokenizer; empty for an engine that takes text."""
    return engine.folder.tokenizer_hash if engine.folder is not None else ""


def _given_models(graph: Graph, overrides: Mapping[str, Any], model: str | None) -> dict[str, str]:
    """Engine name -> command line option, for each engine whose model such an option chose."""
    given = {} if model is None else dict.fromkeys(graph.engines, f"--model {model}")
    named = {name: f"{name}.model" for name in graph.engines}
    return given | {
        name: assignment(target, overrides[target])
        for name, target in named.items()
        if target in overrides
    }


def _describe_or_diagnose(name: str, graph: Graph, given: str) -> EngineDescription | Diagnostic:
    """The description of an engine, or a diagnostic if the engine cannot open.

    `given`: the command line option that chose the model; empty if the graph chose it.
    """
    try:
        return describe_engine(graph, name)
    except ModelError as error:
        return _bad_model(name, given, error.cause, error.fix)
    except UnsupportedModel as error:
        return _bad_model(name, given, f"{error.file}, {error.field}: {error.cause}", error.fix)
    except (OptionError, EngineOptionError) as error:
        return Diagnostic("bad-engine", ("engines", name), f"engine {name}: {error}")


def _bad_model(name: str, given: str, cause: str, fix: str) -> Diagnostic:
    if given:  # the model in the file does not matter: name the option instead
        return Diagnostic("bad-engine", (given,), cause, fix or None)
    return Diagnostic("bad-engine", ("engines", name), f"engine {name}: {cause}", fix or None)
