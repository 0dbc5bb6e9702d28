"""The command from its first import: Ctrl-C ends it with code 130 and one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sagellm import __main__ as command


@pytest.fixture(autouse=True)
def handler() -> Any:
    """Restore the handlers: the command sets its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handled in before.items():
        signal.signal(number, handled)


def wrapped() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise ImportError("numpy failed to import") from error


def grouped() -> None:
    raise BaseExceptionGroup("a nursery", [KeyboardInterrupt()])


def plain() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("interrupt", [plain, wrapped, grouped])
def test_an_interrupt_of_an_import_is_one_line(
    interrupt: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "import_module", lambda name: interrupt())
    assert command.main() == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_any_other_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "import_module", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.main()


@pytest.mark.parametrize(
    ("library", "sent", "code"),
    [
        ("msgspec/_core", signal.SIGINT, 130),
        ("libtorch_cpu", signal.SIGINT, 130),
        ("msgspec/_core", signal.SIGTERM, 143),
    ],
)
def test_a_process_is_interrupted_while_it_imports(
    library: str, sent: signal.Signals, code: int
) -> None:
    arguments = [sys.executable, "-m", "sagellm", "run", "joint", "--prompt", "a"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    without_compiler = {**os.environ, "CC": "no-such-compiler"}  # so that torch computes
    process: Any = subprocess.Popen(arguments, **pipes, env=without_compiler)
    maps = Path(f"/proc/{process.pid}/maps")
    while library not in maps.read_text():
        time.sleep(0.002)
    process.send_signal(sent)
    out, said = process.communicate(timeout=30)
    assert (process.returncode, out, said) == (code, "", "error: interrupted\n")


def test_a_sigterm_while_a_graph_is_opened_ends_it_as_ctrl_c_does(tmp_path: Path) -> None:
    """The workers end, and their folder is removed."""
    arguments = [sys.executable, "-m", "sagellm", "serve", "joint", "--port", "0"]
    arguments += ["--executor", "processes"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment)
    while not any(tmp_path.glob("sagellm-*/hub")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (143, "error: interrupted\n")
    assert not any(tmp_path.glob("*sagellm-*"))


def test_an_interrupt_that_a_library_catches_ends_the_process_too(tmp_path: Path) -> None:
    """As numpy and some of torch's imports do."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    exec('')\n"
        "except BaseException:\n    pass\n"
    )
    arguments = [sys.executable, "-m", "sagellm", "doctor"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        arguments, capture_output=True, text=True, env=environment, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_an_error_whose_causes_form_a_cycle_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def cyclic(_: str) -> None:
        inner = ValueError("the fault")
        group = ExceptionGroup("a nursery", [inner])
        inner.__context__ = group
        raise group

    monkeypatch.setattr(command, "import_module", cyclic)
    with pytest.raises(ExceptionGroup, match="a nursery"):
        command.main()
