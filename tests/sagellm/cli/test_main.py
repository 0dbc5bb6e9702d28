import json
import platform
import subprocess
import sys
from importlib import metadata

import pytest

from sagellm import __version__
from sagellm.cli import main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert listed["sagellm"] == __version__
    assert listed["python"] == platform.python_version()
    assert listed["torch"] == metadata.version("torch")


def test_the_version_option_prints_the_version_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_version_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["version", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["sagellm"] == __version__
    assert set(found) >= {"python", "torch", "trio"}


def test_version_loads_no_torch() -> None:
    code = (
        "import sys; from sagellm.cli import main; main(['version']); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("argv", "cause"),
    [
        (["rum"], 'Unknown command "rum"'),
        (["run"], "GRAPH requires an argument"),
        (["run", "pd", "--promt", "x"], "Did you mean --prompt?"),
        (["run", "pd", "--prompt", "x", "--seed", "y"], 'unable to convert "y" into int'),
        (["run", "pd", "--prompt", "x", "--max-tokens", "0"], "Must be >= 1"),
        (["graph", "show", "pd", "--format", "png"], "png"),
    ],
)
def test_a_wrong_command_line_is_said_in_one_place(
    argv: list[str], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert cause in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "130" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["run"], ["graph"], ["doctor"], ["bench"], ["version"]])
def test_every_command_has_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "--help"]) == 0
    assert "Usage: sagellm" in capsys.readouterr().out
