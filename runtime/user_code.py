"""Errors of a user's own code: finds where they were raised, and writes messages about them."""

import asyncio
import inspect
import math
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

_STDLIB = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_TEXT_CHARS = 500
_user_packages: set[str] = set()  # installed packages whose operators or functions are used


class WrongResult(TypeError):
    """A user's code returned a value that its operator does not accept.

    The message has only types and no values, so clients may see it.
    """

    def __init__(self, message: str, place: str | None = None) -> None:
        super().__init__(message)
        self.place = place  # file:line of the code that returned the result


class NamedError(RuntimeError):
    """Represents an error whose type has the name `kind`, for example one read from a log."""

    def __init__(self, kind: str, text: str = "") -> None:
        super().__init__(text)
        self.kind = kind


class CodeLeft(NamedError):
    """A user's code raised SystemExit or `asyncio.CancelledError`.

    Either would end the program or a task; only the request fails instead.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(type(error).__name__, str(error))
        self.__cause__ = error
        self.__traceback__ = error.__traceback__


LEAVING = (SystemExit, asyncio.CancelledError)  # not subclasses of Exception; see CodeLeft


def as_error(error: BaseException) -> Exception:
    """The exception itself, or a CodeLeft for an exception of `LEAVING`."""
    return error if isinstance(error, Exception) else CodeLeft(error)


def name_of(error: BaseException) -> str:
    """The name of an error's type, for messages."""
    return error.kind if isinstance(error, NamedError) else type(error).__name__


def count_as_own(*modules: str) -> None:
    """Treat the packages of these modules as the user's own code, even if they are installed."""
    _user_packages.update(module.partition(".")[0] for module in modules)


def module_of(code: object) -> str:
    """The name of the module of a function, or of an object's class; empty if unknown."""
    plain = getattr(code, "func", code)  # functools.partial has `func`
    return str(getattr(plain, "__module__", None) or "")


def place_of(error: BaseException) -> str | None:
    """file:line of the innermost frame in the user's own code; None without such a frame.

    The user's own code is all code outside sagellm, the standard library and installed packages,
    and the packages given to `count_as_own`.
    """
    if isinstance(error, WrongResult) and error.place:
        return error.place
    own = [trace for trace in _traces(error.__traceback__) if _is_user_frame(trace)]
    files = [trace for trace in own if not _file(trace).startswith("<")]
    last = (files or own)[-1:]
    return f"{_file(last[0])}:{last[0].tb_lineno}" if last else None


def place_of_code(code: Callable[..., Any]) -> str | None:
    """file:line of the definition of a function, or of an object's `__call__`.

    None for code of sagellm.
    """
    plain = inspect.unwrap(getattr(code, "func", code))  # functools.partial has `func`
    plain = plain if hasattr(plain, "__code__") else getattr(type(plain), "__call__", plain)  # noqa: B004
    found = getattr(plain, "__code__", None)
    if str(getattr(plain, "__module__", "")).partition(".")[0] == "sagellm":
        return None
    return f"{found.co_filename}:{found.co_firstlineno}" if found else None


def traceback_of(error: BaseException) -> str | None:
    """The traceback as text, from the first frame in the user's code; None without such a frame."""
    if isinstance(error, WrongResult) and error.place:
        return f"{error.place}: {error}"
    first = next((trace for trace in _traces(error.__traceback__) if _is_user_frame(trace)), None)
    if first is None:
        return None
    return "".join(traceback.format_exception(type(error), error, first)).rstrip()


def error_text(error: BaseException) -> str:
    """Type, text and place of an error: `NameError: name 'x' is not defined (guard.py:3)`."""
    place = place_of(error)
    text = str(error)
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        place, text = f"{error.filename}:{error.lineno}", error.msg
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{named} ({place})" if place else named


def failure_text(public: str, cause: BaseException | None) -> str:
    """A message with the public part (operator and error type), and the text and place of `cause`.

    Only for callers in this process: the text of a cause may quote private data.
    """
    if cause is None:
        return public
    text = "" if isinstance(cause, WrongResult) else " ".join(str(cause).split())
    if text == "no running event loop":
        text += "; graphs run on trio: use trio or anyio here, not asyncio"
    place = place_of(cause)
    whole = f"{public}: {text[:_TEXT_CHARS]}" if text else public
    return f"{whole} ({place})" if place else whole


def kind_of(value: object) -> str:
    """A description of a wrong value for messages: None, NaN, or its type."""
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _traces(trace: TracebackType | None) -> list[TracebackType]:
    traces = []
    while trace is not None:
        traces.append(trace)
        trace = trace.tb_next
    return traces


def _file(trace: TracebackType) -> str:
    return trace.tb_frame.f_code.co_filename


def _is_user_frame(trace: TracebackType) -> bool:
    package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    file = _file(trace)
    if package == "sagellm" or file.startswith("<frozen"):
        return False
    if _INSTALLED.intersection(Path(file).parts):
        return package in _user_packages
    return not file.startswith(_STDLIB)
