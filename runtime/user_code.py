"""Errors of a user's own code: where they were raised, and what is said of them."""

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
_own_packages: set[str] = set()  # installed ones that offer operators, functions, ...


class WrongResult(TypeError):
    """A user's code returned what its operator does not take. The text has types, no values."""

    def __init__(self, message: str, place: str | None = None) -> None:
        super().__init__(message)
        self.place = place  # file:line of the code that returned


class NamedError(RuntimeError):
    """Stands for an error of the type `kind`."""

    def __init__(self, kind: str, text: str = "") -> None:
        super().__init__(text)
        self.kind = kind


class CodeLeft(NamedError):
    """A user's code raised what would end the program or its task: SystemExit, CancelledError of
    asyncio. That is an error of the request it was called for.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(type(error).__name__, str(error))
        self.__cause__ = error
        self.__traceback__ = error.__traceback__


LEAVING = (SystemExit, asyncio.CancelledError)


def as_error(error: BaseException) -> Exception:
    """What user code raised, as an error of its request."""
    return error if isinstance(error, Exception) else CodeLeft(error)


def name_of(error: BaseException) -> str:
    """The type of an error, as a sentence names it."""
    return error.kind if isinstance(error, NamedError) else type(error).__name__


def count_as_own(*modules: str) -> None:
    """From now on, take the packages of these modules for the user's own, installed or not."""
    _own_packages.update(module.partition(".")[0] for module in modules)


def module_of(code: object) -> str:
    """The module of a function, or of the class of an object; empty where none is known."""
    plain = getattr(code, "func", code)  # functools.partial has `func`
    return str(getattr(plain, "__module__", None) or "")


def place_of(error: BaseException) -> str | None:
    """file:line of the innermost frame in the user's own file; None where no frame is the user's.

    Frames of sagellm, the standard library and installed packages are passed over, but for packages
    that `count_as_own`.
    """
    if isinstance(error, WrongResult) and error.place:
        return error.place
    own = [trace for trace in _traces(error.__traceback__) if _is_own(trace)]
    files = [trace for trace in own if not _file(trace).startswith("<")]
    last = (files or own)[-1:]
    return f"{_file(last[0])}:{last[0].tb_lineno}" if last else None


def place_of_code(code: Callable[..., Any]) -> str | None:
    """file:line where a function, or the method `__call__` of an object, is defined.

    None for code of sagellm itself.
    """
    plain = inspect.unwrap(getattr(code, "func", code))  # functools.partial has `func`
    plain = plain if hasattr(plain, "__code__") else getattr(type(plain), "__call__", plain)  # noqa: B004
    found = getattr(plain, "__code__", None)
    if str(getattr(plain, "__module__", "")).partition(".")[0] == "sagellm":
        return None
    return f"{found.co_filename}:{found.co_firstlineno}" if found else None


def traceback_of(error: BaseException) -> str | None:
    """The traceback from the user's first frame on, as text; None where no frame is the user's."""
    if isinstance(error, WrongResult) and error.place:
        return f"{error.place}: {error}"
    first = next((trace for trace in _traces(error.__traceback__) if _is_own(trace)), None)
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
    """What may be told of an error (operator and type), with its text and its place behind."""
    if cause is None:
        return public
    text = "" if isinstance(cause, WrongResult) else " ".join(str(cause).split())
    if text == "no running event loop":
        text += "; graphs run on trio: use trio or anyio here, not asyncio"
    place = place_of(cause)
    whole = f"{public}: {text[:_TEXT_CHARS]}" if text else public
    return f"{whole} ({place})" if place else whole


def kind_of(value: object) -> str:
    """How a sentence names a wrong value: None, NaN, or its type."""
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


def _is_own(trace: TracebackType) -> bool:
    package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    file = _file(trace)
    if package == "sagellm" or file.startswith("<frozen"):
        return False
    if _INSTALLED.intersection(Path(file).parts):
        return package in _own_packages
    return not file.startswith(_STDLIB)
