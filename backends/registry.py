"""Backends by name: those of this package, and the entry points `sagellm.backends`."""

import importlib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import cast

from sagellm.backends.interface import Backend
from sagellm.graphs.vocabulary import nearest

GROUP = "sagellm.backends"
_HERE = Path(__file__).parent


class UnknownBackend(ValueError):
    """No backend of that name is installed."""


def list_available_backends() -> tuple[str, ...]:
    """Names that `get_backend` knows, in order of the alphabet."""
    return tuple(sorted({*_built_in(), *_installed()}))


def get_backend(name: str) -> Backend:
    """The backend of that name; its folder or package is imported now. Raises UnknownBackend."""
    if name in _built_in():
        return cast(Backend, importlib.import_module(f"{GROUP}.{name}").BACKEND)
    if name in _installed():
        return cast(Backend, _installed()[name].load())
    known = list_available_backends()
    close = nearest(name, known)
    hint = f"did you mean {close!r}?" if close else f"there are {', '.join(known)}"
    raise UnknownBackend(f"no backend {name!r}; {hint}")


def _built_in() -> tuple[str, ...]:
    """A folder here that has `__init__.py` is a backend."""
    return tuple(path.parent.name for path in _HERE.glob("*/__init__.py"))


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
