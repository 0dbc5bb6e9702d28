"""`--config FILE` and `--print-config`: reads and prints the options of `serve` as TOML."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sagellm.cli.errors import Failure, suggestion
from sagellm.cli.setting import LIMITS, GivenOptions, InvalidSetting, Setting, settings_of
from sagellm.gateway.settings import Budget, RequestLimits, Settings, StorageLimits, Streaming

MAX_CONFIG_BYTES = 1 << 20  # a wrong path may name a file of weights: do not read it all
TABLES = ("limits", "keys", "set")
_OPTIONS_ONLY = {  # option that a file may not contain -> the fix in the error
    "api_key": "write a table [keys.NAME] with key_file, key_env or key",
    "limit": "write a table [limits] with NAME = VALUE",
    "import": "give --import on the command line, or write imports: in the graph file",
    "config": "give --config on the command line",
    "print_config": "give --print-config on the command line",
}
_NOT_IN_A_FILE = frozenset({*_OPTIONS_ONLY, *TABLES})
_SECRETS = ("admin_key",)
_BUDGET = settings_of(Budget)
_HEADER = re.compile(r"\s*\[+\s*([^\]]+?)\s*\]+")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")
_AT_LINE = re.compile(r"line (\d+), column (\d+)")

KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KeyTable:
    """`[keys.NAME]`: an API key or its source, and the tenant's budget. `where`: file and line."""

    key: str = field(default="", repr=False)
    key_file: Path | None = None
    key_env: str = ""
    budget: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The contents of a file.

    `values`: field name of an option struct -> value. `limits`: name in LIMITS -> value. `keys`:
    tenant -> key. `set`: `op.key` -> value.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, KeyTable] = field(default_factory=dict)
    set: Mapping[str, object] = field(default_factory=dict)
    path: Path | None = None


def read_config(path: Path, structs: Sequence[type]) -> ConfigFile:
    """Read a file with options of `structs` and the tables `[limits]`, `[keys.NAME]` and `[set]`.

    Paths in the file are relative to the folder of the file. Raises Failure with the line of each
    mistake, and OSError if the file cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise Failure(
            f"the file is larger than {MAX_CONFIG_BYTES >> 20} MiB", "is it TOML?", str(path)
        )
    try:
        text = content.decode("utf-8-sig")  # some editors add a byte order mark
        tree = tomllib.loads(text)
    except UnicodeDecodeError:
        raise Failure("the file is not UTF-8", "save it as UTF-8", str(path)) from None
    except tomllib.TOMLDecodeError as error:
        raise _not_toml(error, text, path) from None
    reader = _Reader(path, _lines(text), structs)
    config = reader.config(tree)
    if reader.mistakes:
        raise _failure(reader.mistakes)
    return config


@dataclass(frozen=True, slots=True)
class _Mistake:
    where: str
    cause: str
    fix: str


class _Reader:
    """Converts the tables of one file. Collects all `mistakes`, so that one error can list them."""

    def __init__(self, path: Path, lines: Mapping[KeyPath, int], structs: Sequence[type]) -> None:
        self.mistakes: list[_Mistake] = []
        self._path = path
        self._lines = lines
        self._settings: dict[str, tuple[str, Setting]] = {  # key of the file -> field, setting
            setting.name: (name, setting)
            for struct in structs
            for name, setting in settings_of(struct).items()
            if setting.name not in _NOT_IN_A_FILE
        }

    def config(self, tree: Mapping[str, Any]) -> ConfigFile:
        values: dict[str, Any] = {}
        tables: dict[str, Mapping[str, Any]] = {}
        for written, value in tree.items():
            key = written.replace("-", "_")
            if key in TABLES:
                tables[key] = self._table((written,), value)
            elif key in self._settings:
                name, setting = self._settings[key]
                values |= self._read((written,), name, setting, value)
            else:
                self._unknown((written,), key, [*self._settings, *TABLES])
        return ConfigFile(
            values=values,
            limits=self._limits(("limits",), tables.get("limits", {})),
            keys={name: self._key(name, one) for name, one in tables.get("keys", {}).items()},
            set=dict(_flat("", tables.get("set", {}))),
            path=self._path,
        )

    def _limits(self, place: KeyPath, table: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for written, value in table.items():
            key = written.replace("-", "_")
            if key in LIMITS:
                found |= self._read((*place, written), key, LIMITS[key], value)
            else:
                self._unknown((*place, written), key, list(LIMITS))
        return found

    def _key(self, name: str, value: object) -> KeyTable:
        place: KeyPath = ("keys", name)
        if isinstance(value, str):  # the short form: NAME = "KEY"
            return KeyTable(key=value, where=self._where(place))
        table = self._table(place, value)
        given: dict[str, Any] = {}
        budget: dict[str, Any] = {}
        for written, each in table.items():
            key = written.replace("-", "_")
            if key in _BUDGET:
                budget |= self._read((*place, written), key, _BUDGET[key], each)
            elif key in _KEY_SOURCES:
                given |= self._read((*place, written), key, _KEY_SOURCES[key], each)
            else:
                self._unknown((*place, written), key, [*_KEY_SOURCES, *_BUDGET])
        sources = {written.replace("-", "_") for written in table} & _KEY_SOURCES.keys()
        if table and len(sources) != 1:  # `_table` has reported an empty table
            fix = "give one of key_file, key_env and key"
            self._mistake(place, f"the key {name} needs one place to come from", fix)
        return KeyTable(**given, budget=budget, where=self._where(place))

    def _read(self, place: KeyPath, name: str, setting: Setting, value: object) -> dict[str, Any]:
        try:
            found = setting.read(value)
        except InvalidSetting as error:
            self._mistake(place, f"{setting.name} {error}", setting.doc)
            return {}
        if isinstance(found, Path):
            found = self._path.absolute().parent / found
        return {name: found}

    def _table(self, place: KeyPath, value: object) -> Mapping[str, Any]:
        if isinstance(value, dict) and value:
            return value
        name = ".".join(place)
        self._mistake(place, f"{name} is no table, or an empty one", f"write [{name}] and its keys")
        return {}

    def _unknown(self, place: KeyPath, key: str, known: Sequence[str]) -> None:
        fix = _OPTIONS_ONLY.get(key) or suggestion(key, known)
        if key in LIMITS and key not in known:
            fix = f"write {key} below [limits]"
        self._mistake(place, f"there is no setting {place[-1]!r} here", fix)

    def _mistake(self, place: KeyPath, cause: str, fix: str) -> None:
        self.mistakes.append(_Mistake(self._where(place), cause, fix))

    def _where(self, place: KeyPath) -> str:
        while place and place not in self._lines:
            place = place[:-1]  # the pattern misses unusual keys: give the line of their table
        return f"{self._path}:{self._lines.get(place, 1)}"


_KEY_SOURCES = {
    "key": Setting("key", str, "", "The key itself: only in a file that nobody else may read."),
    "key_file": Setting("key_file", Path, None, "A file that holds the key."),
    "key_env": Setting("key_env", str, "", "The environment variable that holds the key."),
}


def _flat(prefix: str, table: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """The values of nested tables under dotted keys, such as `admission.max_queued`."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield prefix + key, value


def _lines(text: str) -> dict[KeyPath, int]:
    """The line of each key and table, found by patterns: tomllib does not report lines."""
    found: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for number, line in enumerate(text.splitlines(), 1):
        if (header := _HEADER.match(line)) and "=" not in line.partition("]")[0]:
            table = _parts(header[1])
            found.setdefault(table, number)
        elif key := _KEY.match(line):
            place = (*table, *_parts(key[1]))
            for end in range(len(table) + 1, len(place) + 1):
                found.setdefault(place[:end], number)
    return found


def _parts(text: str) -> KeyPath:
    return tuple(part.strip("\"'") for part in _PART.findall(text))


def _not_toml(error: tomllib.TOMLDecodeError, text: str, path: Path) -> Failure:
    cause, _, place = str(error).partition(" (at ")
    match = _AT_LINE.match(place)
    where = f"{match[1]}:{match[2]}" if match else f"{len(text.splitlines())}"  # at its end
    fix = 'write NAME = VALUE, with texts in quotes, as host = "0.0.0.0"'
    return Failure(f"this is not TOML: {cause[:1].lower()}{cause[1:]}", fix, f"{path}:{where}")


def _failure(mistakes: Sequence[_Mistake]) -> Failure:
    if len(mistakes) == 1:
        (only,) = mistakes
        return Failure(only.cause, only.fix, only.where)
    listed = "".join(f"\n  {one.where}: {one.cause}; {one.fix}" for one in mistakes)
    return Failure(f"{len(mistakes)} mistakes in the settings{listed}", "nothing was started")


def format_config(
    options: Sequence[GivenOptions],
    settings: Settings,
    config: ConfigFile,
    changes: Mapping[str, object],
) -> str:
    """The settings as the text of a config file. Secrets are left out; defaults are comments.

    The file gives the same settings once the user has added the secrets. `changes`: overridden
    options of the graph, `op.key` -> value.
    """
    lines = ["# sagellm serve GRAPH --config THIS_FILE", ""]
    for struct in options:
        for name, setting in settings_of(type(struct)).items():
            if setting.name not in _NOT_IN_A_FILE:
                lines += _setting_lines(setting, getattr(struct, name), setting.default)
    lines += ["[limits]", *_limit_lines(settings)]
    for name in settings.api_keys:
        lines += _key_lines(name, config)
    if changes:
        assigned = (f"{_quoted(name)} = {_value(value)}" for name, value in changes.items())
        lines += ["[set]", *assigned]
    return "\n".join(lines).rstrip() + "\n"


def _setting_lines(setting: Setting, value: Any, default: Any) -> list[str]:
    lines = [f"# {setting.doc}"]
    if value is None:
        lines.append(f"# {setting.name} =")
    elif setting.name in _SECRETS or _has_password(value):
        lines.append(f"# {setting.name} is set, and not shown")
    else:
        mark = "# " if value == default else ""
        lines.append(f"{mark}{setting.name} = {as_toml(setting, value)}")
    return [*lines, ""]


def _has_password(value: object) -> bool:
    """Whether a value is a URL that may contain a password: https://user:password@host."""
    return isinstance(value, str) and "://" in value and "@" in value


def as_toml(setting: Setting, value: Any) -> str:
    """The value as TOML. A number of bytes gets the largest unit that divides it: "8MiB"."""
    if setting.is_bytes:
        for shift, unit in ((20, "MiB"), (10, "KiB")):
            if value % (1 << shift) == 0:
                return f'"{value >> shift}{unit}"'
    return _value(value)


def _limit_lines(settings: Settings) -> Iterator[str]:
    usual = Settings(api_keys=settings.api_keys).common_budget
    parts = (
        (settings.limits, RequestLimits()),
        (settings.streaming, Streaming()),
        (settings.storage, StorageLimits()),
    )
    for part, default in (*parts, (settings.common_budget, usual)):
        for name in settings_of(type(part)):
            yield from _setting_lines(LIMITS[name], getattr(part, name), getattr(default, name))


def _key_lines(name: str, config: ConfigFile) -> list[str]:
    """The lines of `[keys.NAME]`: the key's source and the budget, never the key itself."""
    table = config.keys.get(name)
    lines = [f"[keys.{_quoted(name)}]"]
    if table is not None and table.key_file is not None:
        lines.append(f"key_file = {_value(table.key_file)}")
    elif table is not None and table.key_env:
        lines.append(f"key_env = {_value(table.key_env)}")
    else:
        lines.append("# its key is not shown")
        lines[0] = f"# {lines[0]}"
        return [*lines, ""]
    known = settings_of(Budget).keys()
    return [*lines, *(f"{key} = {_value(table.budget[key])}" for key in known & table.budget), ""]


def _quoted(name: str) -> str:
    return name if name.replace("-", "").replace("_", "").isalnum() else json.dumps(name)


def _value(value: Any) -> str:
    # Strings, numbers and booleans have the same syntax in JSON and in TOML.
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
