"""The Containerfile: what it copies is what a wheel needs, and its commands are those there are.

No image is built here. `make lint` has hadolint read the file.
"""

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sagellm.cli import main

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "deploy" / "Containerfile").read_text()
COPIED = tuple(
    source for line in re.findall(r"^COPY (.+)", TEXT, re.M) for source in line.split()[:-1]
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the copied files alone."""
    folder = tmp_path_factory.mktemp("src")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, folder)
    command = "from hatchling.build import build_wheel; print(build_wheel('dist'))"
    (folder / "dist").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return folder / "dist" / done.stdout.split()[-1]


def test_a_wheel_has_all_that_serving_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert {
        "sagellm/py.typed",
        "sagellm/graphs/pd.yaml",
        "sagellm/operators/route.py",
        "sagellm/runtime/models/sage_tiny/model.safetensors",
        "sagellm/backends/cpu/native/step.c",
    } <= held


def test_a_wheel_holds_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {
            "sagellm",
            wheel.name.split("-py3")[0] + ".dist-info",
        }


def test_the_command_is_one_that_serves(capsys: pytest.CaptureFixture[str]) -> None:
    command = shlex.split(re.search(r"^CMD \[(.+)\]$", TEXT, re.M)[1].replace(",", " "))
    assert main([command[0], "--help"]) == 0
    shown = capsys.readouterr().out
    assert [option for option in command if option.startswith("--") and option not in shown] == []


def test_the_torch_is_the_one_that_is_pinned() -> None:
    pinned = re.search(r"^torch==.+$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert pinned[0] in TEXT
