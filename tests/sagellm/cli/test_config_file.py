"""A config file: its settings, and the line of each mistake."""

from pathlib import Path

import pytest

from sagellm.cli import main
from sagellm.cli.config_file import ConfigFile, read_config
from sagellm.cli.errors import Failure
from sagellm.cli.serve_options import CONFIG_FILE_OPTIONS, read_limits

WHOLE = """\
# A server for two teams.
host = "0.0.0.0"
allowed-host = "models.example"
tls_certificate = "tls/certificate.pem"

[limits]
body_bytes = "16MiB"
num_waiting = 64

[keys]
short = "a-key"

[keys.team-a]
key_env = "TEAM_A"
num_open = 5

[set.admission]
max_queued = 12
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    return path


def read(tmp_path: Path, text: str) -> ConfigFile:
    return read_config(written(tmp_path, text), CONFIG_FILE_OPTIONS)


def test_what_a_file_says(tmp_path: Path) -> None:
    config = read(tmp_path, WHOLE)
    assert config.values == {
        "host": "0.0.0.0",
        "allowed_host": ("models.example",),
        "tls_certificate": tmp_path / "tls" / "certificate.pem",  # relative to the file
    }
    assert config.limits == {"body_bytes": 16 << 20, "num_waiting": 64}
    assert config.keys["short"].key == "a-key"
    assert (config.keys["team-a"].key_env, config.keys["team-a"].budget) == (
        "TEAM_A",
        {"num_open": 5},
    )
    assert config.set == {"admission.max_queued": 12}


def test_names_may_have_hyphens(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    config = read(tmp_path, "drain-s = 3.0\n[keys.a]\nkey-file = 'key'\nnum-open = 2\n")
    assert config.values == {"drain_s": 3.0}
    assert config.keys["a"].key_file == tmp_path / "key"
    assert config.keys["a"].budget == {"num_open": 2}


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, "").values == {}


@pytest.mark.parametrize(
    ("text", "line", "cause", "fix"),
    [
        ('\n\nhots = "x"', 3, "no setting 'hots'", "did you mean host?"),
        ('port = "x"', 1, "port is 'x'", "0 chooses a free one"),
        ("\nport = 70000", 2, "<= 65535", "0 chooses"),
        ('server = "apache"', 1, '"hypercorn" or "uvicorn"', "uvicorn"),
        ("insecure = 1", 1, "true or false", "Let everybody in"),
        ("tls_key = ''", 1, "a path", "PEM"),
        ("drain_s = nan", 1, "a number", "SIGTERM"),
        ("body_bytes = 4", 1, "no setting", "below [limits]"),
        ('api_key = "k"', 1, "no setting", "[keys.NAME]"),
        ("[limits]\n\nbody_byte = 4", 3, "no setting 'body_byte'", "body_bytes?"),
        ("[limits]\njson_depth = 1", 2, "at least 4", "Levels of JSON"),
        ("limits = 3", 1, "no table", "[limits]"),
        ("host = 'x'\n[keys.a]\nkey_fil = 'x'\nkey='k'", 3, "'key_fil'", "key_file?"),
        ("[keys.a]\nnum_open = 3", 1, "needs one place", "key_file"),
        ("[keys.a]\nkey = 'a'\nkey_env = 'B'", 1, "needs one place", "key_file"),
        ("keys.a.num_open = -1\nkeys.a.key = 'k'", 1, "at least 0", "under way"),
        ("a = 1\nb = ", 2, "not TOML", "NAME = VALUE"),
    ],
)
def test_a_mistake_has_its_line_and_a_way_out(
    text: str, line: int, cause: str, fix: str, tmp_path: Path
) -> None:
    with pytest.raises(Failure) as caught:
        read(tmp_path, text)
    assert caught.value.where.split("serve.toml:")[1].split(":")[0] == str(line)
    assert cause in caught.value.cause
    assert fix in caught.value.fix


def test_all_mistakes_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, 'hots = "x"\nport = "x"\n[limits]\nbody_byte = 4\n')
    assert main(["serve", "joint", "--config", str(path)]) == 2
    shown = capsys.readouterr().err
    assert "3 mistakes" in shown
    assert [f"{path}:{line}:" in shown for line in (1, 2, 4)] == [True] * 3
    assert "Traceback" not in shown


@pytest.mark.parametrize("content", [b"host = '\xff'", b"x" * ((1 << 20) + 1)])
def test_a_file_that_is_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_bytes(content)
    with pytest.raises(Failure, match=r"UTF-8|larger"):
        read_config(path, CONFIG_FILE_OPTIONS)


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "joint", "--config", "/none/serve.toml"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_limits_of_the_command_line() -> None:
    given = ("body_bytes=16MiB", "stall-s = 60", "num_open=0")
    assert read_limits(given) == {"body_bytes": 16 << 20, "stall_s": 60.0, "num_open": 0}


@pytest.mark.parametrize(
    ("given", "cause", "fix"),
    [
        ("body_bytes", "needs a value", "body_bytes=16MiB"),
        ("body_byte=4", "no limit", "did you mean body_bytes?"),
        ("body_bytes=many", "16MiB", "Size of a body"),
    ],
)
def test_a_limit_that_is_none(given: str, cause: str, fix: str) -> None:
    with pytest.raises(Failure, match=cause) as caught:
        read_limits([given])
    assert fix in caught.value.fix
    assert caught.value.where == f"--limit {given}"


def test_the_settings_that_hold_are_printed_and_nothing_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagellm.opening.open_graph.open_engines", None)
    monkeypatch.setenv("TEAM_A", "hidden-a")
    path = written(tmp_path, WHOLE.replace("tls_certificate", "# "))
    options = ("--config", str(path), "--port", "9", "--limit", "num_waiting=65", "--insecure")
    assert main(["serve", "joint", *options, "--admin-key", "hidden-b", "--print-config"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert {"port = 9", 'host = "0.0.0.0"', "num_waiting = 65", 'key_env = "TEAM_A"'} <= set(lines)
    assert '"admission.max_queued" = 12' in lines
    assert "# gateways = 0" in lines  # the default
    assert "hidden" not in shown
    assert "a-key" not in shown
