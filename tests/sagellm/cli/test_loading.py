"""What a person at a terminal sees of a start, and that nobody else sees any of it."""

import os
import pty
import re
import sys

import pytest

from sagellm.backends.interface import Compiling, Loading, ProgressEvent
from sagellm.cli.terminal import SHORT_BYTES, show_start_progress
from sagellm.logs import WRITERS, process_logs

GIB = 1 << 30
COMPILING = Compiling("/usr/bin/gcc -m64", "/home/me/.cache/sagellm/native")


def seen(monkeypatch: pytest.MonkeyPatch, *events: ProgressEvent) -> str:
    """What a terminal shows of these, and of what comes too late."""
    monkeypatch.setenv("COLUMNS", "100")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with show_start_progress() as progress:
            for event in events:
                progress(event)
        progress(Loading("late", 1, GIB))
        stderr.write("end")
        stderr.flush()
        shown = b""
        while not shown.endswith(b"end"):
            shown += os.read(reader, 1 << 16)
        monkeypatch.undo()
    os.close(reader)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


def test_kernels_that_compile_are_one_line_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(monkeypatch, COMPILING) == (
        "compiling C kernels with gcc: the first start on this machine with this version; "
        "they are kept in /home/me/.cache/sagellm/native\r\nend"
    )


def test_weights_that_load_are_bytes_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = seen(monkeypatch, Loading("big[1]", GIB, 4 * GIB), Loading("big[1]", 2 * GIB, 4 * GIB))
    assert "loading big[1]" in shown
    assert "2.0/4.0 GiB" in shown
    assert re.search(r"\d\d:\d\d|--:--", shown)
    assert "late" not in shown


def test_each_worker_has_a_bar_and_small_models_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    models = ("m (decode[0])", "m (decode[1])")
    shown = seen(
        monkeypatch,
        *(Loading(model, 1, GIB) for model in models),
        Loading("tiny", 1, SHORT_BYTES - 1),
        *(Loading(model, GIB, GIB) for model in models),
    )
    assert all(f"loading {model}" in shown for model in models)
    assert "tiny" not in shown


def test_log_lines_do_not_stand_in_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with process_logs(20):
        seen(monkeypatch, Loading("big", 1, GIB))
        assert [writer.takes_line for writer in WRITERS] == [False]
        reader, writer = pty.openpty()
        with os.fdopen(writer, "w") as stderr:
            monkeypatch.setattr(sys, "stderr", stderr)
            with show_start_progress() as progress:
                progress(Loading("big", 1, GIB))
                assert [writer.takes_line for writer in WRITERS] == [True]
            monkeypatch.undo()
        os.close(reader)


def test_nobody_else_sees_it(capsys: pytest.CaptureFixture[str]) -> None:
    with show_start_progress() as progress:
        progress(COMPILING)
        progress(Loading("big", GIB, 4 * GIB))
    assert capsys.readouterr() == ("", "")
