"""Registers users' code under the names that graphs use, and imports users' modules.

`--import` and the key `imports` of a graph file name modules. Only the user's own command or a
Python call imports them. A graph received over a wire never causes an import: codecs, checks,
workers and gateways ignore `imports`.
"""

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

from sagellm.chat_formats import FORMATS, ChatFormat, read_chat_format
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
    """Make `op: NAME` and `ops.NAME(...)` mean this operator.

    Raises ValueError for a name that is taken, TypeError for a value that is no operator.
    """
    RESOLVER.register(spec, build)


def register_function(function: Callable[..., Any], name: str | None = None) -> None:
    """Make `function: NAME` of a graph mean this function. The default NAME is `__name__`.

    Raises ValueError for a taken or invalid name, TypeError for a value that is no callable.
    """
    known = name if name is not None else getattr(function, "__name__", "")
    FUNCTIONS.register(known, check_callable(known, function))


@overload
def function(given: F) -> F: ...


@overload
def function(given: str) -> Callable[[F], F]: ...


def function(given: Any) -> Any:
    """Register a function by a decorator: `@sagellm.function` or `@sagellm.function("a_name")`."""
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
    """Make `policy: NAME` of `policy_sort` mean this policy.

    A policy that is a frozen dataclass may have options and a state: see
    `sagellm.operators.policies.order.RankingPolicy`. `uses` names the options of `policy_sort` that
    the policy reads; a graph that sets an option outside `uses` is refused. Raises ValueError for a
    name that is taken, TypeError for a value that is no policy.
    """
    if name == OWN:
        raise ValueError(f"policy {OWN!r} is the order of `function`; choose another name")
    POLICIES.register(name, check_policy(name, policy, uses))


def register_strategy(name: str, strategy: RegisteredStrategy) -> None:
    """Make `strategy: NAME` of `route` mean this strategy.

    A strategy is a function (candidates, now, draw) -> one replica, or several with the best first.
    A strategy that is a frozen dataclass may have options and a state: see
    `sagellm.operators.routing.Strategy`. Raises ValueError for a name that is taken, TypeError for
    a value that is no strategy.
    """
    STRATEGIES.register(name, check_strategy(name, strategy))


def register_engine_kind(name: str, kind: EngineKind) -> None:
    """Make `kind: NAME` of an engine mean this kind.

    Raises ValueError for a name that is taken, TypeError for a value that is no kind.
    """
    KINDS.register(name, read_kind(name, kind))


def register_transport(name: str, kind: TransportKind) -> None:
    """Make `kv: NAME` of executor `processes` mean this transport, in this process only.

    For worker processes, a package must declare the transport as an entry point of the group
    `sagellm.transports`. Raises ValueError for a name that is taken, TypeError for a value that is
    no transport.
    """
    TRANSPORTS.register(name, read_transport(name, kind))


def register_chat_format(name: str, chat_format: ChatFormat) -> None:
    """Use this format for models whose chat templates it matches, before the formats that ship.

    Gateways in processes of their own do not know it: for them, a package must declare the format
    as an entry point of the group `sagellm.chat_formats`. Raises ValueError for a name that is
    taken, TypeError for a value that is no chat format.
    """
    FORMATS.register(name, read_chat_format(name, chat_format))


@dataclass
class ImportMistake(Exception):
    """The error for a module that could not be imported."""

    name: str
    cause: str
    fix: str

    def __str__(self) -> str:
        return f"{self.cause}: {self.fix}"


def import_named(name: str, folder: Path) -> ModuleType:
    """Import a dotted module name, or the path of a .py file relative to `folder`.

    A process runs each module once. Raises ImportMistake.
    """
    is_file = name.endswith(".py") or os.sep in name
    return _import_file(name, folder / name) if is_file else _import_module(name)


def import_all(document: Document, folder: Path) -> None:
    """Import the modules that a graph file names, in order.

    Raises GraphError with the position of every name that failed.
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
    """Import a dotted name. The current folder is searched first, as `python -m` does."""
    if name.split(".")[0] != "sagellm" and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Another name is missing: an import inside the user's module failed, `name` is right.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed(name, error) from error
        fix = f"give a module that {os.getcwd()} or this Python has, or the path of a .py file"
        raise ImportMistake(name, f"there is no module `{error.name}`", fix) from None
    except (Exception, SystemExit) as error:
        raise _failed(name, error) from error


def _import_file(name: str, path: Path) -> ModuleType:
    """Import a file under a unique name, so that a user's `json.py` hides no other module."""
    resolved = path.resolve()
    digest = hashlib.blake2b(str(resolved).encode(), digest_size=6).hexdigest()
    unique = f"sagellm_import_{digest}_{resolved.stem}"
    if unique in sys.modules:  # a second run would register every name twice
        return sys.modules[unique]
    if not resolved.is_file() or resolved.suffix != ".py":
        cause = f"`{name}` is no .py file" if resolved.exists() else f"there is no file `{path}`"
        raise ImportMistake(name, cause, "give the path of a .py file, or a dotted module")
    if str(resolved.parent) not in sys.path:
        # The file may import modules of its folder. At the end of sys.path they hide no other.
        sys.path.append(str(resolved.parent))
    spec = importlib.util.spec_from_file_location(unique, resolved)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # before the module runs: dataclasses look up their module here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script may call sys.exit() at its end
        del sys.modules[unique]
        raise _failed(name, error) from error
    return module


def _failed(name: str, error: BaseException) -> ImportMistake:
    cause = f"importing `{name}` raised {error_text(error)}"
    return ImportMistake(name, cause, "fix that file; nothing was started")


def import_each(names: Iterable[str], folder: Path) -> None:
    """Import several modules. Raises ImportMistake for the first failure."""
    for name in names:
        import_named(name, folder)
