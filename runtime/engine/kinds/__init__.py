"""The kinds of engines, by name. A new one is a file beside these and a line below; those of users
are registered, or offered by packages as entry points `sagellm.engines`.
"""

import importlib
from collections.abc import Iterator, Mapping

from sagellm.graphs.engines import LOCAL, MODELLED
from sagellm.runtime.engine.kinds.kind import EngineKind, read_kind
from sagellm.runtime.registry import Registry


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
