"""The cost of the client: one process must read 2,000 events a second on one core."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sagellm.cli import main

EVENTS_PER_S = 2000
TINY = Path(__file__).parents[1] / "sagellm" / "load" / "tiny_server.py"


@pytest.fixture
def tiny() -> Iterator[str]:
    """The URL of a server in a process of its own that sends 64 events, 5 ms apart."""
    command = [sys.executable, str(TINY), "64", "0.005"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().split()[1]}"
        process.kill()


def test_an_event_costs_little(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--concurrency", "12", "--num-requests", "60", "--json")
    assert main(["bench", "serve", "--url", tiny, *options]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["completion_tokens"] == 60 * 64
    assert said["client"]["cpu_us_per_event"] < 1e6 / EVENTS_PER_S
