"""A real server in a process of its own, for clients of other projects.

Nothing here imports sagellm: `make clients` runs these tests in environments that contain only a
client and pytest. SAGELLM_BIN names the server's command there.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import pytest

KEY = "sk-of-the-tests"
START_S = 60.0


def command():
    """The `sagellm` command of this environment, or the one in SAGELLM_BIN."""
    beside = Path(sys.executable).with_name("sagellm")
    return os.environ.get("SAGELLM_BIN") or (str(beside) if beside.exists() else "sagellm")


def url_in(log):
    """The URL that the server prints when it is ready; None before."""
    said = re.search(r" at (http:\S+:\d+)$", log.read_text(), re.MULTILINE)
    return said and said[1]


def is_ready(url):
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5):
            return True
    except (URLError, OSError):
        return False


@contextmanager
def serving(log, *options, graph="pd"):
    """The URL of a graph that ships, with sage-tiny, served until the block ends."""
    command_line = [command(), "serve", graph, "--port", "0", "--api-key", KEY, *options]
    with log.open("wb") as errors:
        process = subprocess.Popen(command_line, stderr=errors)
    until = time.monotonic() + START_S
    while (base := url_in(log)) is None or not is_ready(base):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")
        time.sleep(0.1)
    yield base
    process.terminate()
    code = process.wait(30)
    assert code == 0, log.read_text()[-2000:]


@pytest.fixture(scope="session")
def serve():
    """A function that serves with other options."""
    return serving


@pytest.fixture(scope="session", params=["hypercorn", "uvicorn"])
def url(request, tmp_path_factory):
    """The URL of a server that all tests share."""
    log = tmp_path_factory.mktemp("server") / f"{request.param}.log"
    with serving(log, "--server", request.param) as base:
        yield base


@pytest.fixture
def num_open(url):
    """A function that returns the number of open requests of the server."""

    def ask():
        request = urllib.request.Request(f"{url}/load", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.read().decode().partition(":")[2].strip(" }\n"))

    return ask


@pytest.fixture
def curl():
    """The path of curl."""
    found = shutil.which("curl")
    if found is None:
        pytest.skip("no curl on this machine")
    return found
