"""Errors of a user's own code: where they were raised, and how messages name them."""

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
_user_packages: set[str] = set()  # installed packages that offer operators, functions, ...


class WrongResult(TypeError):
    """A user's code returned a value that its operator does not take.

    The message has types and no values, so that it is safe to show.
    """

    def __init__(self, message: str, place: str | None = None) -> None:
        super().__init__(message)
        self.place = place  # file:line of the code that returned the result


class NamedError(RuntimeError):
    """Stands for an error of the type `kind`."""

    def __init__(self, kind: str, text: str = "") -> None:
        super().__init__(text)
        self.kind = kind


class CodeLeft(NamedError):
    """A user's code raised SystemExit, or CancelledError of asyncio.

    Both would end the program or its task; they count as an error of the request instead.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(type(error).__name__, str(error))
        self.__cause__ = error
        self.__traceback__ = error.__traceback__


LEAVING = (SystemExit, asyncio.CancelledError)


def as_error(error: BaseException) -> Exception:
    """The exception of a user's code as an error of its request."""
    return error if isinstance(error, Exception) else CodeLeft(error)


def name_of(error: BaseException) -> str:
    """The type of an error, for a message."""
    return error.kind if isinstance(error, NamedError) else type(error).__name__


def count_as_own(*modules: str) -> None:
    """Count the packages of these modules as the user's own code, installed or not."""
    _user_packages.update(module.partition(".")[0] for module in modules)


def module_of(code: object) -> str:
    """The module of a function or of an object's class; empty if unknown."""
    plain = getattr(code, "func", code)  # functools.partial has `func`
    return str(getattr(plain, "__module__", None) or "")


def place_of(error: BaseException) -> str | None:
    """file:line of the innermost frame in the user's own code; None without such a frame.

    Frames of sagellm, the standard library and installed packages are skipped, but for packages
    that `count_as_own`.
    """
    if isinstance(error, WrongResult) and error.place:
        return error.place
    own = [trace for trace in _traces(error.__traceback__) if _is_user_frame(trace)]
    files = [trace for trace in own if not _file(trace).startswith("<")]
    last = (files or own)[-1:]
    return f"{_file(last[0])}:{last[0].tb_lineno}" if last else None


def place_of_code(code: Callable[..., Any]) -> str | None:
    """file:line of the definition of a function, or of an object's `__call__`.

    None for code of sagellm itself.
    """
    plain = inspect.unwrap(getattr(code, "func", code))  # functools.partial has `func`
    plain = plain if hasattr(plain, "__code__") else getattr(type(plain), "__call__", plain)  # noqa: B004
    found = getattr(plain, "__code__", None)
    if str(getattr(plain, "__module__", "")).partition(".")[0] == "sagellm":
        return None
    return f"{found.co_filename}:{found.co_firstlineno}" if found else None


def traceback_of(error: BaseException) -> str | None:
    """The traceback from the user's first frame on, as text; None without such a frame."""
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
    """The public part of a message (operator and type), with the text and place of its cause.

    Only callers in this process may see the whole: the text of a cause may hold private data.
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
    """How a message names a wrong value: None, NaN, or its type."""
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
