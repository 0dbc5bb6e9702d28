"""An option and a file can set every setting of a gateway."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from tls_pairs import tls_pair

from sagellm.cli.config_file import ConfigFile, format_config, read_config
from sagellm.cli.serve_options import (
    CONFIG_FILE_OPTIONS,
    GraphOptions,
    ListenOptions,
    ObservabilityOptions,
    ServedModelOptions,
    read_settings,
)
from sagellm.cli.setting import (
    LIMIT_STRUCTS,
    LIMITS,
    InvalidSetting,
    Setting,
    _plain,
    merge_given,
    settings_of,
)
from sagellm.gateway.settings import Settings


def other(setting: Setting) -> Any:
    """A valid value other than the default."""
    kind, default = _plain(setting.hint), setting.default
    if get_origin(kind) is Literal:
        return next(each for each in get_args(kind) if each != default)
    if get_origin(kind) is tuple:
        return ["https://app.example"]
    if kind is bool:
        return not default
    return {str: "other", Path: "file"}.get(kind) or (default or 1) + 1


def toml(values: dict[str, Any]) -> str:
    return "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file with every setting that a file may contain."""
    certificate, key = tls_pair(tmp_path)
    (tmp_path / "salt").write_text("a-salt-key-of-32-bytes-or-more--")
    values = {
        setting.name: other(setting)
        for struct in (ListenOptions, ObservabilityOptions)
        for name, setting in settings_of(struct).items()
        if name not in ("api_key", "admin_key_file")
    }
    values |= {"host": "0.0.0.0", "otlp_endpoint": "http://collector:4318", "trace_sample": 0.5}
    values |= {"tls_certificate": certificate.name, "tls_key": key.name, "salt_key_file": "salt"}
    limits = {name: other(setting) for name, setting in LIMITS.items()}
    tables = f"\n[limits]\n{toml(limits)}\n[keys.a]\nkey = 'k'\nnum_open = 5\n"
    path = tmp_path / "serve.toml"
    path.write_text(toml(values) + tables)
    return path


def test_every_field_of_the_settings_can_be_set_in_a_file(written: Path) -> None:
    config = read_config(written, CONFIG_FILE_OPTIONS)
    listen, watch = (
        merge_given(ListenOptions(), config.values),
        merge_given(ObservabilityOptions(), config.values),
    )
    settings, usual = read_settings(listen, ("other",), watch, config), Settings()
    unset = [
        field.name
        for field in fields(Settings)
        if getattr(settings, field.name) == getattr(usual, field.name)
    ]
    assert unset == []
    for part in ("limits", "streaming"):
        changed, default = getattr(settings, part), getattr(usual, part)
        for field in fields(changed):
            assert getattr(changed, field.name) != getattr(default, field.name), field.name
    assert settings.budget is not None
    assert (settings.budget.num_open, settings.budgets["a"].num_open) == (1025, 5)
    assert settings.budgets["a"].num_waiting == settings.budget.num_waiting == 1025


def test_a_password_in_a_url_is_not_printed() -> None:
    options = ObservabilityOptions(otlp_endpoint="http://user:hunter2@collector:4318")
    shown = format_config((options,), Settings(), ConfigFile(), {})
    assert "hunter2" not in shown
    assert "otlp_endpoint is set, and not shown" in shown


def test_what_is_printed_gives_the_same_settings(written: Path, tmp_path: Path) -> None:
    config = read_config(written, CONFIG_FILE_OPTIONS)
    options = [merge_given(struct(), config.values) for struct in CONFIG_FILE_OPTIONS]
    settings = read_settings(options[1], ("other",), options[3], config)  # type: ignore[arg-type]
    shown = format_config(options, settings, config, {"admission.max_queued": 7})
    assert '"k"' not in shown
    assert "admin_key is set, and not shown" in shown
    again = tmp_path / "printed.toml"
    again.write_text(shown)
    read = read_config(again, CONFIG_FILE_OPTIONS)
    known = {key: value for key, value in config.values.items() if key != "admin_key"}
    assert read.values == known
    assert read.limits == config.limits
    assert read.set == {"admission.max_queued": 7}


@pytest.mark.parametrize("struct", [*CONFIG_FILE_OPTIONS, *LIMIT_STRUCTS])
def test_every_setting_has_a_sentence(struct: type) -> None:
    settings = settings_of(struct)
    assert set(settings) == {field.name for field in fields(struct)}
    assert [name for name, setting in settings.items() if not setting.doc.endswith(".")] == []


def test_no_two_settings_have_one_name() -> None:
    """`--limit` and `[limits]` accept limits of all structs."""
    assert len(LIMITS) == sum(len(fields(struct)) for struct in LIMIT_STRUCTS)
    options = [one.name for struct in CONFIG_FILE_OPTIONS for one in settings_of(struct).values()]
    assert len(options) == len(set(options))


def test_an_option_wins_over_the_file_also_where_it_is_the_default() -> None:
    values = {"port": 9000, "host": "::", "model": "m"}
    assert merge_given(ListenOptions(port=8000), values) == ListenOptions(port=8000, host="::")
    assert merge_given(ListenOptions(), values).port == 9000
    assert (
        merge_given(ListenOptions(admin_key="a"), {"admin_key_file": Path("x")}).admin_key_file
        is None
    )
    assert merge_given(GraphOptions(), values).model == "m"
    assert merge_given(ServedModelOptions(), values) == ServedModelOptions()


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("body_bytes", "16MiB", 16 << 20),
        ("body_bytes", 5, 5),
        ("stall_s", 5, 5.0),
        ("num_open", 0, 0),
    ],
)
def test_values_of_limits(name: str, value: object, found: object) -> None:
    assert LIMITS[name].read(value) == found


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("body_bytes", "16 elephants", "16MiB"),
        ("body_bytes", 0, "at least 1"),
        ("stall_s", 0, "more than 0"),
        ("stall_s", float("inf"), "a number"),
        ("num_prompts", True, "a whole number"),
        ("num_prompts", 1.5, "a whole number"),
        ("num_prompts", "16MiB", "a whole number"),
    ],
)
def test_a_value_that_a_limit_does_not_take(name: str, value: object, wanted: str) -> None:
    with pytest.raises(InvalidSetting, match=wanted):
        LIMITS[name].read(value)
