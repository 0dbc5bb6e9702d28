"""`--print-config`: the settings that hold, as TOML with a sentence each, without keys."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sagellm.cli.config_file import TABLES, Config
from sagellm.cli.setting import LIMITS, Setting, TracksGiven, settings_of
from sagellm.gateway.settings import Budget, Limits, Settings, Streaming

SECRETS = ("admin_key",)
_APART = ("api_key", "config", "import", "limit", "print_config", *TABLES)


def printed(
    options: Sequence[TracksGiven],
    settings: Settings,
    config: Config,
    changes: Mapping[str, object],
) -> str:
    """A file that gives the same settings, once its keys are filled in. What is not changed is a
    comment. `changes`: of the graph.
    """
    lines = ["# sagellm serve GRAPH --config THIS_FILE", ""]
    for struct in options:
        for name, setting in settings_of(type(struct)).items():
            if setting.name not in _APART:
                lines += _entry(setting, getattr(struct, name), setting.default)
    lines += ["[limits]", *_limits(settings)]
    for name in settings.api_keys:
        lines += _key(name, config)
    if changes:
        assigned = (f"{_quoted(name)} = {_value(value)}" for name, value in changes.items())
        lines += ["[set]", *assigned]
    return "\n".join(lines).rstrip() + "\n"


def _entry(setting: Setting, value: Any, default: Any) -> list[str]:
    lines = [f"# {setting.doc}"]
    if value is None:
        lines.append(f"# {setting.name} =")
    elif setting.name in SECRETS or _has_password(value):
        lines.append(f"# {setting.name} is set, and not shown")
    else:
        mark = "# " if value == default else ""
        lines.append(f"{mark}{setting.name} = {as_toml(setting, value)}")
    return [*lines, ""]


def _has_password(value: object) -> bool:
    """Whether it is a URL that names a user: https://user:password@host."""
    return isinstance(value, str) and "://" in value and "@" in value


def as_toml(setting: Setting, value: Any) -> str:
    """The value as a file has it: "8MiB" rather than 8388608."""
    if setting.is_bytes:
        for shift, unit in ((20, "MiB"), (10, "KiB")):
            if value % (1 << shift) == 0:
                return f'"{value >> shift}{unit}"'
    return _value(value)


def _limits(settings: Settings) -> Iterator[str]:
    usual = Settings(api_keys=settings.api_keys).common_budget
    parts = (settings.limits, Limits()), (settings.streaming, Streaming())
    for part, default in (*parts, (settings.common_budget, usual)):
        for name in settings_of(type(part)):
            yield from _entry(LIMITS[name], getattr(part, name), getattr(default, name))


def _key(name: str, config: Config) -> list[str]:
    """A key in the file would be one that others may read: say where it came from."""
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
    """JSON's texts, numbers and truth values are TOML's."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
