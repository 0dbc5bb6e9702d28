"""Engine kinds: the contract of a kind, and the registry that finds kinds by name."""

import importlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from sagellm.backends.interface import Progress, silent
from sagellm.graphs.rules.rule import EngineFactsView
from sagellm.graphs.sections import LOCAL, MODELLED
from sagellm.graphs.vocabulary import CAPABILITIES
from sagellm.runtime.kv.transport import Sharing
from sagellm.runtime.models import FolderWarning
from sagellm.runtime.models.folder import ModelFolder
from sagellm.runtime.port import Engine
from sagellm.runtime.registry import Registry


@dataclass(frozen=True, slots=True)
class ReplicaPlace:
    """Which replica of an engine is opened, and where.

    `sharing`: how other processes reach its KV pool; None where all engines are in this process.
    `num_blocks`: of its pool in an earlier life, if it had one. `progress` is called with each
    event of the start. `may_abandon`: a cancelled opening may leave a thread that still loads.
    """

    engine: str
    replica: int = 0
    sharing: Sharing | None = None
    num_blocks: int | None = None
    progress: Progress = silent
    may_abandon: bool = False


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """An engine that can be opened, as far as it is known without loading it.

    `folder`: of the model whose tokenizer encodes its prompts; None where it takes text.
    `warnings`: what a user should know of folders. `sizes`: options that the size of the memory has
    decided, so that the engine is opened as it was checked.
    """

    view: EngineFactsView
    model: str = ""
    folder: ModelFolder | None = None
    warnings: tuple[FolderWarning, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One kind of engine: `kind: NAME` of an engine in a graph.

    `options`: the frozen dataclass of its options; if it has `replicas`, that many are opened, and
    if it has `model`, that names the model. `capabilities`: what its engines can do, of
    CAPABILITIES. `open(options, place)` opens one replica. `describe(options)` says what is known
    before; it reads no weight. Both raise EngineOptionError, ModelError or UnsupportedModel for
    what cannot be opened. Raises TypeError and ValueError for parts that are none.
    """

    options: type
    capabilities: frozenset[str]
    open: Callable[[Any, ReplicaPlace], Awaitable[Engine]]
    describe: Callable[[Any], EngineDescription] | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.options, type) and is_dataclass(self.options)):
            raise TypeError("options of an engine kind are a dataclass")
        unknown = sorted(set(self.capabilities) - set(CAPABILITIES))
        if unknown:
            known = ", ".join(CAPABILITIES)
            raise ValueError(f"{unknown[0]!r} is no capability; there are {known}")
        for name, part in (("open", self.open), ("describe", self.describe)):
            if part is not None and not callable(part):
                raise TypeError(f"{name} must be a function, not {type(part).__name__}")

    def described(self, options: Any) -> EngineDescription:
        """What `describe` says, or what follows from the options alone."""
        if self.describe is not None:
            return self.describe(options)
        view = EngineFactsView(
            replicas=getattr(options, "replicas", 1), capabilities=self.capabilities
        )
        return EngineDescription(view, str(getattr(options, "model", "")))


def read_kind(name: str, found: Any) -> EngineKind:
    """An entry point is an EngineKind, or a module with one as KIND. Raises TypeError."""
    kind = getattr(found, "KIND", found)
    if not isinstance(kind, EngineKind):
        raise TypeError(f"{name!r} must be an EngineKind, or a module with KIND, an EngineKind")
    return kind


class _Shipped(Mapping[str, EngineKind]):
    """The files of this folder; each is imported when its kind is asked for."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._modules = modules

    def __getitem__(self, name: str) -> EngineKind:
        return read_kind(name, importlib.import_module(self._modules[name]))

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


KINDS: Registry[EngineKind] = Registry(
    "engine kind",
    "sagellm.engines",
    _Shipped(
        {
            LOCAL: "sagellm.runtime.engine.kinds.local",
            MODELLED: "sagellm.runtime.engine.kinds.modelled",
        }
    ),
    read_kind,
)
