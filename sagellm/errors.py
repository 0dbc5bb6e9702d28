"""Errors with a fix for misused calls: blocking calls in an event loop, graphs that are not open,
the wrong kind of `with`. Also names the file of an OSError.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import sniffio

_OPENED = frozenset(
    {"stream", "generate", "generate_all", "cancel", "idle", "statistics", "health"}
)
_EXITS = {"__enter__": "__exit__", "__aenter__": "__aexit__"}

T = TypeVar("T")


class UsageError(RuntimeError):
    """A call from the wrong place or in the wrong form. The message gives the correct form."""


def running_loop() -> str | None:
    """`trio` or `asyncio` if the calling code runs in such an event loop, else None."""
    try:
        return sniffio.current_async_library()
    except sniffio.AsyncLibraryNotFoundError:
        return None if asyncio._get_running_loop() is None else "asyncio"


def blocked_loop(call: str, instead: str) -> str | None:
    """The error text for a blocking call inside an event loop; None outside a loop."""
    loop = running_loop()
    if loop is None:
        return None
    return f"{call} blocks the {loop} loop that it is called in: use {instead}"


def refuse_in_loop(call: str, instead: str) -> None:
    """Raise UsageError inside an event loop: a blocking call would stop every task of the loop."""
    fault = blocked_loop(call, instead)
    if fault is not None:
        raise UsageError(fault)


def misused(**forms: str) -> Callable[[type[T]], type[T]]:
    """Add special methods to a class that raise UsageError: `misused(__iter__="read it with ...")`.

    Type checkers do not see these methods, so they still report the mistake.
    """

    def decorate(kind: type[T]) -> type[T]:
        for name, text in forms.items():
            setattr(kind, name, _refusing(text))
            if name in _EXITS:  # `with` looks up both methods before it calls the first
                setattr(kind, _EXITS[name], _refusing(text))
        return kind

    return decorate


def unopened(how: str) -> Callable[[type[T]], type[T]]:
    """Decorate a class of graphs that are not open: looking up a session's method, such as
    `generate`, raises an AttributeError with `how`, the form that opens a graph.
    """

    def decorate(kind: type[T]) -> type[T]:
        def look_up(self: T, name: str) -> NoReturn:
            if name in _OPENED:
                raise AttributeError(f"{name} is a method of an open graph: {how}")
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")

        setattr(kind, "__getattr__", look_up)  # noqa: B010 - hidden from type checkers
        return kind

    return decorate


def _refusing(text: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any) -> NoReturn:
        raise UsageError(text)

    return refuse


@contextmanager
def naming_file(path: Path | str) -> Iterator[None]:
    """Set `path` as the file name of an OSError that has none, such as the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
