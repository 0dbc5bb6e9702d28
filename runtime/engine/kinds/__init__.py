"""Engine kinds: the contract of a kind, and the registry that finds kinds by name."""

import importlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from sagellm.backends.interface import Progress, silent
from sagellm.graphs.rules.rule import EngineFactsView
from sagellm.graphs.sections import EMBEDDINGS, LOCAL, MODELLED, OPENAI
from sagellm.graphs.vocabulary import CAPABILITIES
from sagellm.runtime.kv.transport import Sharing
from sagellm.runtime.models import FolderWarning
from sagellm.runtime.models.folder import ModelFolder
from sagellm.runtime.port import Engine
from sagellm.runtime.registry import Registry


@dataclass(frozen=True, slots=True)
class ReplicaPlace:
    """The replica of an engine that is opened, and how it is opened.

    `sharing`: how other processes reach its KV pool; None if all engines are in this process.
    `num_blocks`: the size of the pool in the replica's earlier life, in blocks; None in its first
    life. `progress` is called with each event of the start. `may_abandon`: whether a cancelled
    opening may leave a thread that still loads.
    """

    engine: str
    replica: int = 0
    sharing: Sharing | None = None
    num_blocks: int | None = None
    progress: Progress = silent
    may_abandon: bool = False


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """The facts of an engine that are known before it is loaded.

    `folder`: the model folder whose tokenizer encodes prompts; None if the engine takes text.
    `warnings`: faults of model folders that a user should know. `sizes`: options that were derived
    from the size of the memory. They are set when the engine is opened, so that it opens as it was
    checked.
    """

    view: EngineFactsView
    model: str = ""
    folder: ModelFolder | None = None
    warnings: tuple[FolderWarning, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One kind of engine: `kind: NAME` of an engine in a graph.

    `options`: the frozen dataclass of the kind's options. A field `replicas` is the number of
    engines to open, and a field `model` names the model. `capabilities`: names from CAPABILITIES
    that the kind's engines have. `open(options, place)` opens one replica. `describe(options)`
    describes an engine without reading weights. Both raise EngineOptionError, ModelError or
    UnsupportedModel for an engine that cannot be opened. Raises TypeError and ValueError for
    invalid fields.
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
        """The result of `describe`. Without `describe`, a description made from the options
        alone.
        """
        if self.describe is not None:
            return self.describe(options)
        view = EngineFactsView(
            replicas=getattr(options, "replicas", 1), capabilities=self.capabilities
        )
        return EngineDescription(view, str(getattr(options, "model", "")))


def read_kind(name: str, found: Any) -> EngineKind:
    """The kind that an entry point offers: an EngineKind, or a module whose KIND is an EngineKind.
    Raises TypeError.
    """
    kind = getattr(found, "KIND", found)
    if not isinstance(kind, EngineKind):
        raise TypeError(f"{name!r} must be an EngineKind, or a module with KIND, an EngineKind")
    return kind


class _Lazy(Mapping[str, EngineKind]):
    """Kinds by name. A kind is imported from its module when it is looked up."""

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


# The built-in kinds: a new kind is a module with KIND, and a line here. Users register kinds of
# their own, or packages offer them as entry points of the group `sagellm.engines`. Option types,
# checks, and the tests of the documents derive from this registry.
KINDS: Registry[EngineKind] = Registry(
    "engine kind",
    "sagellm.engines",
    _Lazy(
        {
            LOCAL: "sagellm.runtime.engine.kinds.local",
            MODELLED: "sagellm.runtime.engine.kinds.modelled",
            EMBEDDINGS: "sagellm.runtime.engine.kinds.embedding",
            OPENAI: "sagellm.foreign.openai_kind",
        }
    ),
    read_kind,
)
