"""Faults are reported before a worker or a gateway starts, and no process is left."""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sagellm.runtime.models.folder import BUILT_IN

START_S = 3.0
BAD_OPERATOR = """
sagellm: 1
name: x
engines: {g: {model: sage-tiny, device: cpu}}
operators: {generate: {op: generrate, engine: g}}
edges: [source -> generate -> sink]
"""


def serve(*arguments: str) -> tuple[int, str, float]:
    """The exit code, the errors and the seconds of a command."""
    command = [sys.executable, "-m", "sagellm", "serve", *arguments, "--executor", "processes"]
    began_s = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr, time.monotonic() - began_s


def check(said: str, *expected: str) -> None:
    """One error with a fix, no traceback, and no living process."""
    for text in expected:
        assert text in said
    assert said.count("error:") == 1
    assert "fix:" in said
    assert "Traceback" not in said
    assert not psutil.Process().children(recursive=True)


@pytest.mark.parametrize(
    ("arguments", "code", "cause"),
    [
        (("pd", "--model", "./no/such/folder"), 2, "there is no such folder"),
        (("pd", "--set", "p.device=cuda"), 2, "'cuda' is not built"),
        (("pd", "--set", "p.num_blocks=100000000"), 2, "there are"),
        (("pd", "--set", "executor.kv=nixel"), 2, "did you mean `nixl`?"),
        (("pd", "--set", "executor.address=tcp://127.0.0.1:0"), 2, "links over tcp need keys"),
    ],
    ids=["model", "device", "memory", "option", "keys"],
)
def test_it_ends_before_a_worker_is_started(
    arguments: tuple[str, ...], code: int, cause: str
) -> None:
    found, said, seconds = serve(*arguments, "--port", "0", "--gateways", "2")
    check(said, cause)
    assert found == code
    assert seconds < START_S


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said, seconds = serve("pd", "--port", str(taken.getsockname()[1]))
    check(said, "the port is in use", "--port")
    assert code == 3
    assert seconds < START_S


def test_an_operator_that_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(BAD_OPERATOR)
    code, said, seconds = serve(str(path), "--port", "0")
    check(said, "generrate", "did you mean", "x.yaml:5:")
    assert code == 2
    assert seconds < START_S


def test_weights_that_are_cut_off(tmp_path: Path) -> None:
    """A worker reports the fault, and all workers end."""
    folder = tmp_path / "model"
    shutil.copytree(BUILT_IN["sage-tiny"], folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    code, said, _ = serve("pd", "--model", str(folder), "--port", "0")
    check(said, "model.safetensors is cut off")
    assert code == 2


@pytest.mark.parametrize("arguments", [(), ("--gateways", "2")], ids=["workers", "gateways"])
def test_too_few_files_are_a_lack_of_resources(arguments: tuple[str, ...]) -> None:
    limited = ["prlimit", "--nofile=20", sys.executable, "-m", "sagellm", "serve", "joint"]
    command = [*limited, "--set", "g.device=null", "--executor", "processes", *arguments]
    done = subprocess.run(
        [*command, "--port", "0"], capture_output=True, text=True, timeout=60, check=False
    )
    check(done.stderr, "20 open files are too few")
    assert done.returncode == 3
