"""The systemd unit, as systemd itself reads it where it is installed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sagellm.cli.errors import CONFIGURATION
from sagellm.cli.serve_options import ListenOptions

UNIT = Path(__file__).resolve().parents[2] / "deploy" / "sagellm.service"
TEXT = UNIT.read_text()

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


@needs_systemd
def test_systemd_finds_no_mistake(tmp_path: Path) -> None:
    here = tmp_path / UNIT.name
    here.write_text(TEXT.replace("/opt/sagellm/bin/sagellm", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(here)], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
def test_what_it_may_do_is_narrow() -> None:
    """systemd's exposure goes from 0 to 10; an ordinary service has 9.6."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=35", str(UNIT)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stdout[-200:]


def test_a_drain_ends_before_systemd_kills() -> None:
    stop_s = re.search(r"^TimeoutStopSec=(\d+)$", TEXT, re.M)
    assert stop_s is not None
    assert int(stop_s[1]) > ListenOptions.drain_s


def test_a_mistake_of_the_user_is_not_tried_again() -> None:
    assert f"RestartPreventExitStatus={CONFIGURATION}" in TEXT
