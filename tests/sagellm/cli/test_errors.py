"""The errors that a user sees, with their exit codes; and how Ctrl-C ends a command."""

import errno
import signal
from pathlib import Path

import pytest
import trio
import trio.testing

from sagellm.batch import open_output
from sagellm.cli.errors import (
    BROKEN_PIPE,
    CONFIGURATION,
    INTERRUPTED,
    RESOURCES,
    Failure,
    drain_on_interrupt,
    explain,
    show_failure,
)
from sagellm.graphs.diagnostics import Diagnostic, GraphError, Position, UnsupportedModel
from sagellm.runtime.models.chat import ChatTemplateError
from sagellm.runtime.models.folder import ModelError

WRONG = Diagnostic("unknown-op", ("operators", "a"), "no op prefil", "did you mean prefill?")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GraphError((WRONG,)), CONFIGURATION),
        (UnsupportedModel("no", field="dtype", fix="do"), CONFIGURATION),
        (ModelError("no folder"), CONFIGURATION),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.jsonl"), CONFIGURATION),
        (PermissionError(errno.EACCES, "Permission denied", "x.jsonl"), CONFIGURATION),
        (FileExistsError(errno.EEXIST, "File exists", "x.jsonl"), CONFIGURATION),
        (OSError(errno.EROFS, "Read-only file system", "x.jsonl"), CONFIGURATION),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x.jsonl"), CONFIGURATION),
        (ChatTemplateError("no template"), CONFIGURATION),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), BROKEN_PIPE),
        (OSError(errno.ENOSPC, "No space left on device"), RESOURCES),
        (OSError(errno.EMFILE, "Too many open files"), RESOURCES),
        (MemoryError(), RESOURCES),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), RESOURCES),
        (KeyboardInterrupt(), INTERRUPTED),
    ],
    ids=repr,
)
def test_what_a_user_can_fix_has_an_exit_code(error: BaseException, code: int) -> None:
    failure = explain(error)
    assert failure is not None
    assert failure.code == code


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("bug"), OSError(errno.EIO, "eh")])
def test_our_own_faults_keep_their_traceback(error: Exception) -> None:
    assert explain(error) is None


def test_the_failure_inside_groups_is_found() -> None:
    inner = BaseExceptionGroup("inner", [KeyboardInterrupt()])
    failure = explain(BaseExceptionGroup("outer", [inner]))
    assert failure is not None
    assert failure.code == INTERRUPTED


def test_one_mistake_says_cause_place_and_fix() -> None:
    placed = Diagnostic(WRONG.code, WRONG.path, WRONG.message, WRONG.hint, Position("g.yaml", 3, 9))
    failure = explain(GraphError((placed,)))
    assert failure == Failure("no op prefil", "did you mean prefill?", "g.yaml:3:9")


def test_several_mistakes_are_all_listed() -> None:
    failure = explain(GraphError((WRONG, WRONG)))
    assert failure is not None
    assert failure.cause.count("no op prefil") == 2
    assert failure.cause.startswith("2 mistakes")


def test_a_failure_is_shown_on_stderr_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show_failure(Failure("no [bold] such graph", "did you mean pd?", "pdd"))
    shown = capsys.readouterr()
    expected = "error: no [bold] such graph\n  where: pdd\n  fix: did you mean pd?\n"
    assert (shown.err, shown.out) == (expected, "")


def test_no_color_is_honoured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    show_failure(Failure("cause", "fix"))
    assert "\x1b[31" not in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_named() -> None:
    line = {"id": "a", "text": "b"}
    with (
        pytest.raises(OSError, match="space") as raised,
        open_output(Path("/dev/full"), force=True) as output,
    ):
        output.write(line)
    failure = explain(raised.value)
    assert failure is not None
    assert (failure.where, failure.code) == ("/dev/full", RESOURCES)


def test_a_full_standard_output_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        failure = explain(OSError(errno.ENOSPC, "No space left on device"))
        monkeypatch.undo()
    assert failure is not None
    assert failure.where == "standard output: /dev/full"


async def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)
    await trio.testing.wait_all_tasks_blocked()


async def test_without_an_interrupt_nothing_is_cancelled() -> None:
    drain = trio.CancelScope()
    async with drain_on_interrupt(drain, "draining"):
        await trio.lowlevel.checkpoint()
    assert not drain.cancel_called


async def test_the_first_interrupt_drains_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    drain = trio.CancelScope()
    async with drain_on_interrupt(drain, "draining"):
        await interrupt()
        assert drain.cancel_called
    assert capsys.readouterr().err == "draining\n"


async def test_the_second_interrupt_stops() -> None:
    with pytest.RaisesGroup(KeyboardInterrupt):
        async with drain_on_interrupt(trio.CancelScope(), "draining"):
            await interrupt()
            await interrupt()
            await trio.sleep_forever()


async def test_afterwards_an_interrupt_is_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGINT)
    async with drain_on_interrupt(trio.CancelScope(), "draining"):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
