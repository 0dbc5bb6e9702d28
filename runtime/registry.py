"""Registries of operators, functions and policies by name, and the reading of their options."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from inspect import signature
from types import FrameType
from typing import Any, Generic, TypeVar

import msgspec

from sagellm.graphs.diagnostics import Diagnostic, GraphError, Path
from sagellm.graphs.ir import FrozenMap, Value, freeze, thaw
from sagellm.graphs.log import get_logger
from sagellm.graphs.rules.option_types import check_options, old_names
from sagellm.graphs.rules.rule import Facts
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.user_code import count_as_own, error_text, module_of

T = TypeVar("T")


class BrokenEntryPoint(ValueError):
    """An entry point of an installed package cannot be loaded, or two packages offer its name."""


class Registry(Mapping[str, T], Generic[T]):
    """Objects of one `kind` by name: operators, functions, policies, strategies or engine kinds.

    A look-up tries the objects that sagellm ships (`ours`), then registered objects, then the entry
    points of installed packages in `group`. An entry point is imported at the first look-up of its
    name; `read(name, imported)` makes a T of it, or raises TypeError or ValueError.
    """

    def __init__(
        self, kind: str, group: str, ours: Mapping[str, T], read: Callable[[str, Any], T]
    ) -> None:
        self.kind = kind
        self.group = group
        self.ours = ours
        self._read = read
        self._registered: dict[str, tuple[T, str]] = {}  # (object, file and line of `register`)
        self._loaded: dict[str, T] = {}

    def register(self, name: str, value: T) -> None:
        """Register an object under a name.

        The same line of code may register a name again, because a notebook or a reload runs it
        again. Raises ValueError for a name that is no identifier, or is taken by other code.
        """
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"{name!r} is no name for a {self.kind}: use letters, digits and `_`")
        caller = _caller()
        here, before = _place(caller), self._place_of(name)
        if before not in (None, here):
            raise ValueError(
                f"{self.kind} {name!r} exists already, {before}; choose another name {here}"
            )
        count_as_own(module_of(value), str(caller.f_globals.get("__name__")))
        self._registered[name] = value, here

    @property
    def at_hand(self) -> Mapping[str, T]:
        """Shipped and registered objects, without those of entry points."""
        return {**self.ours, **{name: value for name, (value, _) in self._registered.items()}}

    def forget(self, name: str) -> None:
        """Take a registered name out of the table again."""
        self._registered.pop(name, None)

    def is_registered_here(self, name: str) -> bool:
        """Whether code in this process registered the name. Other processes do not know it."""
        return name in self._registered

    def find(self, name: str) -> T:
        """The object of a name.

        Raises BrokenEntryPoint, and ValueError for an unknown name, with the nearest known name or
        all names in the message.
        """
        if name in self:
            return self[name]
        close = nearest(name, list(self))
        hint = f"did you mean {close}?" if close else f"known are {', '.join(self)}"
        raise ValueError(f"unknown {self.kind} {name!r}: {hint}")

    def __getitem__(self, name: str) -> T:
        """The object of a name. Raises KeyError, BrokenEntryPoint."""
        if name in self.ours:
            return self.ours[name]
        if name in self._registered:
            return self._registered[name][0]
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self.ours or name in self._registered or name in self._offered.names

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self.ours, *self._registered, *sorted(self._offered.names))))

    def __len__(self) -> int:
        return len(list(iter(self)))

    @property
    def _offered(self) -> EntryPoints:
        return _installed(tuple(sys.path), self.group)

    def _place_of(self, name: str) -> str | None:
        if name in self.ours:
            return "as it ships with sagellm"
        if name in self._registered:
            return self._registered[name][1]
        offers = self._offered.select(name=name)
        return f"from {_package_of(next(iter(offers)))}" if offers else None

    def _load(self, name: str) -> T:
        offers = {offer.value: offer for offer in self._offered.select(name=name)}
        if not offers:
            raise KeyError(name)
        if len(offers) > 1:
            packages = " and ".join(sorted(map(_package_of, offers.values())))
            raise BrokenEntryPoint(f"{self.kind} {name!r} is offered by {packages}: remove one")
        (offer,) = offers.values()
        count_as_own(offer.module)  # first, so that an error while loading names its place
        try:
            return self._read(name, offer.load())
        except Exception as error:
            raise BrokenEntryPoint(
                f"{self.kind} {name!r} of {_package_of(offer)} cannot be loaded from "
                f"{offer.value}: {error_text(error)}"
            ) from error


@lru_cache(maxsize=16)
def _installed(path: tuple[str, ...], group: str) -> EntryPoints:
    """The entry points of a group in all packages on `sys.path`; cached, as reading takes long.

    `path`: the current `sys.path`, so that a change of it misses the cache.
    """
    return entry_points(group=group)


def _package_of(offer: EntryPoint) -> str:
    return f"package {offer.dist.name}" if offer.dist is not None else "an installed package"


def _caller() -> FrameType:
    """The frame of the code that registers something: the first outside `_OWN_MODULES`."""
    frame = sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__")) in _OWN_MODULES:
        frame = frame.f_back
    return frame


def _place(frame: FrameType) -> str:
    file = frame.f_code.co_filename
    shown = os.path.relpath(file) if file.startswith(os.getcwd() + os.sep) else file
    return f"in {shown}:{frame.f_lineno}"


_OWN_MODULES = {__name__, "sagellm.runtime.resolver", "sagellm.extensions"}


def check_callable(name: str, value: Any, takes: tuple[str, ...] | None = None) -> Any:
    """Return the value if it is callable.

    `takes`: the names of the positional arguments of the call. Raises TypeError if the value is not
    callable, or not with these arguments.
    """
    if not callable(value):
        raise TypeError(f"{name!r} must be a function, not {type(value).__name__}")
    if takes is not None and not _can_take(value, len(takes)):
        raise TypeError(
            f"{name!r} is called with ({', '.join(takes)}), and its parameters are "
            f"{signature(value)}"
        )
    return value


def _can_take(value: Callable[..., Any], number: int) -> bool:
    """Whether a function accepts `number` positional arguments; True if that is unknown."""
    try:
        signature(value).bind(*range(number))
    except TypeError:
        return False
    except ValueError:  # functions written in C may have no signature
        return True
    return True


def check_user_class(what: str, value: type, parts: tuple[str, ...]) -> type:
    """Return the class. Raises TypeError if it lacks an attribute of `parts` or is no dataclass.

    `what`: names the class in the message.
    """
    missing = [part for part in parts if not hasattr(value, part)]
    if missing:
        raise TypeError(f"{what}: class {value.__name__} has no {missing[0]}")
    if not is_dataclass(value):
        raise TypeError(f"{what}: class {value.__name__} must be a frozen dataclass")
    return value


# Functions that users register for the option `function` of operators. sagellm ships none.
FUNCTIONS: Registry[Callable[..., Any]] = Registry(
    "function", "sagellm.functions", {}, check_callable
)


log = get_logger("sagellm.options")


class OptionError(ValueError):
    """An option is unknown, or its value has the wrong type."""


def read_options(options: type[T], attrs: FrozenMap | Mapping[str, Value]) -> T:
    """Build the dataclass `options` from the values of a graph. Raises OptionError."""
    attrs = with_current_names(options, attrs)
    known = {option.name for option in fields(options)}  # type: ignore[arg-type]
    plain: dict[str, Any] = {name: thaw(value) for name, value in attrs.items() if name in known}
    unknown = sorted(set(attrs) - known - {"engine"})
    if unknown:
        raise OptionError(f"{options.__name__} has no option {unknown[0]!r}")
    try:
        return msgspec.convert(plain, options)
    except msgspec.ValidationError as error:
        raise OptionError(str(error)) from error


def with_current_names(options: type, values: Mapping[str, Value]) -> Mapping[str, Value]:
    """The option values with old option names replaced by the current names, with a warning each.

    If both names of an option are given, the old name stays, and the option check refuses it.
    """
    current = {old: name for old, name in old_names(options).items() if name not in values}
    for old in current.keys() & values.keys():
        _warn_of_old_name(old, current[old])
    return {current.get(name, name): value for name, value in values.items()}


@lru_cache(maxsize=64)  # warn once per process: the same options are read many times
def _warn_of_old_name(old: str, name: str) -> None:
    log.warning("option_renamed", option=old, use=name)


def check_and_read_options(made: type[T], given: Mapping[str, Any], path: Path) -> T:
    """Check the option values at `path` of a graph, and build the dataclass `made` from them.

    Raises GraphError with all mistakes.
    """
    values = freeze(dict(given))
    assert isinstance(values, FrozenMap)
    mistakes = tuple(check_options(path, values, made, Facts()))
    if mistakes:
        raise GraphError(mistakes)
    return read_options(made, values)


def refuse_options(what: str, given: Mapping[str, Any], path: Path) -> None:
    """Raise GraphError if options are given at `path` for something that has none.

    `what`: names it in the message.
    """
    if given:
        message = f"{what} has no options of its own"
        raise GraphError((Diagnostic("unknown-option", path, message, "leave them out"),))
