"""The completion scripts, read by the installed shells."""

import shutil
import subprocess
from pathlib import Path

import pytest

from sagellm.cli import main
from sagellm.cli.errors import CONFIGURATION


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script_of("bash", tmp_path_factory.mktemp("bash"))


def script_of(shell: str, folder: Path) -> Path:
    """The script of a shell, in a file."""
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lines.append)
        assert not main(["completion", shell])
    path = folder / f"sagellm.{shell}"
    path.write_text("\n".join(lines))
    return path


COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _sagellm; printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["ser"], "serve"),
        (["completion", "f"], "fish"),
        (["graph", "ch"], "check"),
        (["serve", "pd", "--exec"], "--executor"),
        (["serve", "--log-level", "w"], "warning"),
    ],
)
def test_bash_completes(bash_script: Path, typed: list[str], offered: str) -> None:
    command = ["bash", "-c", COMPLETE, "bash", str(bash_script), "sagellm", *typed]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [offered]


def test_bash_completes_file_names_elsewhere(bash_script: Path) -> None:
    assert "complete -o default -F _sagellm sagellm" in bash_script.read_text()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_script_of_another_shell(shell: str, tmp_path: Path) -> None:
    """The shell parses the script if it is installed."""
    path = script_of(shell, tmp_path)
    assert "sagellm" in path.read_text()
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(path)], check=True)


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == CONFIGURATION
    assert "bash" in capsys.readouterr().err
