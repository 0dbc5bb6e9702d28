"""The declaration of a setting, for command line and config file: name, type, range, default."""

import ast
import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec
from cyclopts import Parameter, Token

from sagellm.gateway.settings import Budget, RequestLimits, StorageLimits, Streaming
from sagellm.runtime.engine.options import EngineOptionError, num_bytes


def _whole(kind: Any, tokens: Sequence[Token]) -> int:
    """Convert an argument. cyclopts shows the ValueError of a wrong one with the option's name."""
    text = tokens[0].value
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text} is no whole number") from None


WholeNumber: TypeAlias = Annotated[int, Parameter(converter=_whole, n_tokens=1)]

_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_RANGES = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
ALTERNATIVES = (frozenset({"admin_key", "admin_key_file"}),)  # either option excludes the other


class InvalidSetting(ValueError):
    """The error for a value of a wrong type or out of range. The message names valid values."""


class GivenOptions:
    """The base class of option structs. `given`: the names of the options that the user gave."""

    given: frozenset[str]

    def __new__(cls, **given: object) -> "GivenOptions":
        # An option given with its default value also counts: it must win over the file's value.
        self = super().__new__(cls)
        object.__setattr__(self, "given", frozenset(given))
        return self


T = TypeVar("T", bound=GivenOptions)


def merge_given(options: T, values: Mapping[str, Any]) -> T:
    """The options that the user gave, with `values` of a config file for all other options.

    `values` may contain names of other structs. A value is dropped if the user gave its alternative
    (see ALTERNATIVES).
    """
    names = {field.name for field in fields(options)}  # type: ignore[arg-type]
    given = {name: getattr(options, name) for name in options.given}
    replaced = {name for pair in ALTERNATIVES if given.keys() & pair for name in pair}
    kept = {name: values[name] for name in (names - replaced) & values.keys()}
    return type(options)(**{**kept, **given})


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `hint`: the annotated type, with its bounds; `doc`: the help text.

    A setting with the unit "bytes" also takes a text such as "16MiB".
    """

    name: str
    hint: Any
    default: Any
    doc: str

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def is_bytes(self) -> bool:
        return any((meta.extra or {}).get("unit") == "bytes" for meta in self._metas)

    @property
    def _metas(self) -> list[msgspec.Meta]:
        return [each for each in _metadata(self.hint) if isinstance(each, msgspec.Meta)]

    def read(self, value: object) -> Any:
        """Check `value`, and convert it to the type of the setting. Raises InvalidSetting."""
        kind = _plain(self.hint)
        if self.is_bytes and isinstance(value, str):
            value = _bytes(value)
        if get_origin(kind) is tuple and isinstance(value, str):
            value = (value,)
        try:
            found = msgspec.convert(value, self.hint, dec_hook=_path)
        except msgspec.ValidationError:
            expected = ", ".join([_phrase(kind), *self._bounds])
            expected += ', or a text like "16MiB"' if self.is_bytes else ""
            raise InvalidSetting(f"is {_printed(value)}; it takes {expected}") from None
        if isinstance(found, float) and not isfinite(found):
            raise InvalidSetting(f"is {found}; it takes a number")
        self._check_range(kind, found)
        return found

    @property
    def _bounds(self) -> Iterator[str]:
        for meta in self._metas:
            for name, words in _RANGES.items():
                if (bound := getattr(meta, name)) is not None:
                    yield f"{words} {bound:g}"

    def _check_range(self, kind: Any, value: object) -> None:
        """Apply the command line's validators to a file's value. Raises InvalidSetting."""
        for each in _metadata(self.hint):
            if isinstance(each, Parameter) and value is not None:
                validators: Any = each.validator
                for validate in validators:
                    try:
                        validate(kind, value)
                    except ValueError as error:
                        fault = str(error).removesuffix(".").replace("Must be", "it must be")
                        raise InvalidSetting(f"is {_printed(value)}; {fault}") from None


def settings_of(struct: type) -> Mapping[str, Setting]:
    """The settings of a dataclass, by field name. Each field needs a docstring."""
    hints, docs = get_type_hints(struct, include_extras=True), _docs(struct)
    return {
        field.name: Setting(
            field.name.rstrip("_"),
            hints[field.name],
            field.default,
            docs[field.name],
        )
        for field in fields(struct)
    }


def _docs(struct: type) -> dict[str, str]:
    """The docstring of each field, parsed from the source: Python does not keep them."""
    body = ast.parse(inspect.getsource(struct)).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body.body)  # a docstring is the statement after its field
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(text.value.value, str)
    }


def _metadata(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())


def _plain(hint: Any) -> Any:
    """The type without annotations and without None."""
    kind = get_args(hint)[0] if _metadata(hint) else hint
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(each for each in get_args(kind) if each is not type(None))
    return kind


def _phrase(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f'"{each}"' for each in get_args(kind))
    if get_origin(kind) is tuple:
        return "a list of texts"
    return "a path" if kind is Path else _KINDS.get(kind, "a text")


def _printed(value: object) -> str:
    return "true" if value is True else "false" if value is False else f"{value!r:.60}"


def _bytes(text: str) -> object:
    try:
        return num_bytes(text)
    except EngineOptionError:
        return text


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str | Path) and str(value):
        return Path(value)
    raise ValueError(value)


LIMIT_STRUCTS = (RequestLimits, Streaming, StorageLimits, Budget)
LIMITS: Mapping[str, Setting] = {
    name: setting for struct in LIMIT_STRUCTS for name, setting in settings_of(struct).items()
}  # the settings of `--limit` and `[limits]`
