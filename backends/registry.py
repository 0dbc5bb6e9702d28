"""Backends by name: those that ship, those that a program registers, and entry points."""

import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from sagellm.backends.interface import Backend
from sagellm.graphs.vocabulary import nearest

GROUP = "sagellm.backends"
# Modules with a `BACKEND`. A module is imported when its backend is first asked for.
SHIPPED: Mapping[str, str] = {"cpu": "sagellm.backends.cpu", "null": "sagellm.backends.null"}
_MEMBERS = ("name", "quantizations", "stages", "devices", "device")
_registered: dict[str, Backend] = {}


class UnknownBackend(ValueError):
    """No backend of that name is installed."""


def register_backend(backend: Backend) -> None:
    """Make `device: NAME` of an engine mean this backend, NAME being its `name`.

    Raises TypeError for an object that lacks a member of Backend, and ValueError for a name that
    another backend has.
    """
    missing = [member for member in _MEMBERS if not hasattr(backend, member)]
    if missing:
        raise TypeError(f"backend {type(backend).__name__} has no {missing[0]}")
    taken = backend.name in SHIPPED or backend.name in _installed()
    if taken or _registered.get(backend.name, backend) != backend:
        raise ValueError(f"backend {backend.name!r} exists already; choose another name")
    _registered[backend.name] = backend


def is_registered_here(name: str) -> bool:
    """Whether this process registered the backend: other processes do not have it."""
    return name in _registered


def list_available_backends() -> tuple[str, ...]:
    """The names that `get_backend` knows, in order of the alphabet."""
    return tuple(sorted({*SHIPPED, *_registered, *_installed()}))


def get_backend(name: str) -> Backend:
    """The backend of that name; its module is imported on first use. Raises UnknownBackend."""
    if name in SHIPPED:
        return cast(Backend, importlib.import_module(SHIPPED[name]).BACKEND)
    if name in _registered:
        return _registered[name]
    if name in (installed := _installed()):
        return cast(Backend, installed[name].load())
    known = list_available_backends()
    close = nearest(name, known)
    hint = f"did you mean {close!r}?" if close else f"there are {', '.join(known)}"
    raise UnknownBackend(f"no backend {name!r}; {hint}")


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
