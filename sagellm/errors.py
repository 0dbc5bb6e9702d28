"""The errors that callers meet: misused calls, wrong requests, files that fail."""

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
    """A call in a place or form that cannot work; the message gives the form that works."""


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
    """Make the lookup of a session's method in a class raise AttributeError that explains opening.

    `how` is the form that opens a graph.
    """

    def decorate(kind: type[T]) -> type[T]:
        def look_up(self: T, name: str) -> NoReturn:
            if name in _OPENED:
                raise AttributeError(f"{name} is a method of an open graph: {how}")
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")

        setattr(kind, "__getattr__", look_up)  # noqa: B010 - as in `misused`
        return kind

    return decorate


def _refusing(text: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any) -> NoReturn:
        raise UsageError(text)

    return refuse


@contextmanager
def naming_file(path: Path | str) -> Iterator[None]:
    """Give an OSError without a file name this path: a full disk raises one without a name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
