"""A user's own code: registered under the names that graphs use, and imported."""

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, overload

from sagellm.graphs.diagnostics import Diagnostic, GraphError, locate
from sagellm.graphs.text.yaml import Document
from sagellm.graphs.vocabulary import OpSpec
from sagellm.operators.policies import OWN, POLICIES, check_policy
from sagellm.operators.policies.order import Policy, PolicySortOptions, RankingPolicy
from sagellm.operators.routing import STRATEGIES
from sagellm.operators.routing.strategy import RegisteredStrategy, check_strategy
from sagellm.runtime.engine.kinds import KINDS, EngineKind, read_kind
from sagellm.runtime.kv.transports import TRANSPORTS, TransportKind, read_transport
from sagellm.runtime.operator import Build
from sagellm.runtime.registry import FUNCTIONS, check_callable
from sagellm.runtime.resolver import Resolver
from sagellm.runtime.user_code import error_text

RESOLVER = Resolver()
F = TypeVar("F", bound=Callable[..., Any])


def register_operator(spec: OpSpec, build: Build) -> None:
    """Make `op: NAME` and `ops.NAME(...)` mean this operator. Raises ValueError where the name is
    taken, TypeError for what is no operator.
    """
    RESOLVER.register(spec, build)


def register_function(function: Callable[..., Any], name: str | None = None) -> None:
    """Make `function: NAME` of a graph mean this function; its own name unless one is given.

    Raises ValueError where the name is taken or is none, TypeError for what cannot be called.
    """
    known = name if name is not None else getattr(function, "__name__", "")
    FUNCTIONS.register(known, check_callable(known, function))


@overload
def function(given: F) -> F: ...


@overload
def function(given: str) -> Callable[[F], F]: ...


def function(given: Any) -> Any:
    """A decorator: `@sagellm.function`, or `@sagellm.function("another_name")`."""
    if isinstance(given, str):
        return lambda decorated: _registered(decorated, given)
    return _registered(given, None)


def _registered(decorated: F, name: str | None) -> F:
    register_function(decorated, name)
    return decorated


def register_policy(
    name: str,
    policy: Callable[[PolicySortOptions], Policy] | type[RankingPolicy],
    *,
    uses: Iterable[str] = (),
) -> None:
    """Make `policy: NAME` of `policy_sort` mean this policy; a frozen dataclass has options and a
    state: see `sagellm.operators.policies.order.RankingPolicy`.

    `uses`: the options of `policy_sort` that it reads; a graph that sets another is refused.
    Raises ValueError where the name is taken, TypeError for what is no policy.
    """
    if name == OWN:
        raise ValueError(f"policy {OWN!r} is the order of `function`; choose another name")
    POLICIES.register(name, check_policy(name, policy, uses))


def register_strategy(name: str, strategy: RegisteredStrategy) -> None:
    """Make `strategy: NAME` of `route` mean this function, (candidates, now, draw) -> a replica or
    several, best first; or this frozen dataclass, which has options and a state: see
    `sagellm.operators.routing.Strategy`.

    Raises ValueError where the name is taken, TypeError for what is no strategy.
    """
    STRATEGIES.register(name, check_strategy(name, strategy))


def register_engine_kind(name: str, kind: EngineKind) -> None:
    """Make `kind: NAME` of an engine mean this kind.

    Raises ValueError where the name is taken, TypeError for what is no kind.
    """
    KINDS.register(name, read_kind(name, kind))


def register_transport(name: str, kind: TransportKind) -> None:
    """Make `kv: NAME` of executor `processes` mean this transport, in this process; a package's
    entry point of the group `sagellm.transports` makes it known in worker processes, too.

    Raises ValueError where the name is taken, TypeError for what is no transport.
    """
    TRANSPORTS.register(name, read_transport(name, kind))


@dataclass
class ImportMistake(Exception):
    """One name that could not be imported: why, and how to fix it."""

    name: str
    cause: str
    fix: str

    def __str__(self) -> str:
        return f"{self.cause}: {self.fix}"


def import_named(name: str, folder: Path) -> ModuleType:
    """The module of that dotted name, or the .py file of that path, relative to `folder`; once a
    process. Raises ImportMistake.
    """
    is_file = name.endswith(".py") or os.sep in name
    return _import_file(name, folder / name) if is_file else _import_module(name)


def import_all(document: Document, folder: Path) -> None:
    """Import what a graph file names, in its order. Raises GraphError with the positions of all
    that failed.
    """
    names = document.graph.attrs.get("imports", ())
    found: list[Diagnostic] = []
    for index, name in enumerate(names if isinstance(names, tuple) else ()):
        try:
            import_named(str(name), folder)
        except ImportMistake as mistake:
            path = ("imports", index)
            found.append(Diagnostic("bad-import", path, mistake.cause, mistake.fix))
    if found:
        raise GraphError(locate(found, document.positions))


def _import_module(name: str) -> ModuleType:
    """As `python -m` does, the current folder is searched first."""
    if name.split(".")[0] != "sagellm" and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed(name, error) from error
        fix = f"give a module that {os.getcwd()} or this Python has, or the path of a .py file"
        raise ImportMistake(name, f"there is no module `{error.name}`", fix) from None
    except (Exception, SystemExit) as error:
        raise _failed(name, error) from error


def _import_file(name: str, path: Path) -> ModuleType:
    """Under a name that no other module has, so that a user's `json.py` hides nothing."""
    resolved = path.resolve()
    digest = hashlib.blake2b(str(resolved).encode(), digest_size=6).hexdigest()
    unique = f"sagellm_import_{digest}_{resolved.stem}"
    if unique in sys.modules:
        return sys.modules[unique]
    if not resolved.is_file() or resolved.suffix != ".py":
        cause = f"`{name}` is no .py file" if resolved.exists() else f"there is no file `{path}`"
        raise ImportMistake(name, cause, "give the path of a .py file, or a dotted module")
    if str(resolved.parent) not in sys.path:
        sys.path.append(str(resolved.parent))  # for its neighbours; last, so that they hide nothing
    spec = importlib.util.spec_from_file_location(unique, resolved)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[unique]
        raise _failed(name, error) from error
    return module


def _failed(name: str, error: BaseException) -> ImportMistake:
    cause = f"importing `{name}` raised {error_text(error)}"
    return ImportMistake(name, cause, "fix that file; nothing was started")


def import_each(names: Iterable[str], folder: Path) -> None:
    """Import several. Raises ImportMistake for the first that fails."""
    for name in names:
        import_named(name, folder)
