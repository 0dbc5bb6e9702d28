"""Faults are reported before a worker or a gateway starts, and no process is left."""

import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
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


MARK = "SAGELLM_TEST_COMMAND"  # an environment variable, which child processes inherit


def run(command: list[str]) -> tuple[int, str]:
    """The exit code and the errors of a command that leaves no process."""
    mark = uuid.uuid4().hex
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, MARK: mark},
    )
    assert marked(mark) == []
    return done.returncode, done.stderr


def marked(mark: str) -> list[psutil.Process]:
    """The living processes of one command, orphans too. Other tests run beside this one, so the
    children of this process may be theirs.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found


def serve(*arguments: str) -> tuple[int, str, float]:
    """The exit code, the errors and the seconds of a command."""
    command = [sys.executable, "-m", "sagellm", "serve", *arguments, "--executor", "processes"]
    began_s = time.monotonic()
    code, said = run(command)
    return code, said, time.monotonic() - began_s


def check(said: str, *expected: str) -> None:
    """One error with a fix, and no traceback."""
    for text in expected:
        assert text in said
    assert said.count("error:") == 1
    assert "fix:" in said
    assert "Traceback" not in said


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
    code, said = run([*command, "--port", "0"])
    check(said, "20 open files are too few")
    assert code == 3


def test_processes_that_outlive_their_command_are_found() -> None:
    orphan = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)"
    mark = uuid.uuid4().hex
    subprocess.run([sys.executable, "-c", orphan], check=True, env={**os.environ, MARK: mark})
    (found,) = marked(mark)
    found.kill()
    psutil.wait_procs([found])
    assert marked(mark) == []
