"""The progress of a start and of a file on a terminal, and the summary of a run."""

import json
import os
import pty
import re
import sys
from pathlib import Path

import pytest

from sagellm.backends.interface import Compiling, Loading, ProgressEvent
from sagellm.batch import LineCounts, error_record
from sagellm.cli.terminal import (
    SHORT_BYTES,
    FileProgress,
    print_summary,
    show_start_progress,
    show_summary,
    summary_rows,
)
from sagellm.logs import WRITERS, process_logs
from sagellm.statistics import Statistics

GIB = 1 << 30
COMPILING = Compiling("/usr/bin/gcc -m64", "/home/me/.cache/sagellm/native")


def seen(monkeypatch: pytest.MonkeyPatch, *events: ProgressEvent) -> str:
    """The output on a terminal of these events, and of an event after the end."""
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


def test_without_a_terminal_only_failures_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in"
    path.write_text("{}\n{}\n")
    with FileProgress(path) as progress:
        progress.advance({"id": 1, "text": ""})
        progress.advance(error_record("[b]", "line 2: no", "malformed"))
        progress.advance(None)
    assert capsys.readouterr().err == "[b]: line 2: no\n"


def test_on_a_terminal_there_is_a_bar_with_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    path = tmp_path / "in"
    path.write_text("{}\n\n{}")
    with FileProgress(path) as progress:
        progress.advance({"id": 1, "text": ""})
    assert "1/2" in capsys.readouterr().err


SEEN = Statistics(
    elapsed_s=2.0,
    num_requests=4,
    num_open=0,
    ended={"length": 3, "refused": 1},
    num_tokens=30,
    ttft_p50_s=0.0251,
    ttft_p99_s=0.04,
    itl_p50_s=None,
    itl_p99_s=None,
    peak_kv_ratio=0.125,
    num_preemptions=0,
    engines={},
)


def test_the_figures() -> None:
    assert dict(summary_rows(SEEN)) == {
        "requests": "1",
        "tokens": "30",
        "tokens/s": "15.0",
        "TTFT p50/p99": "25.1 / 40.0 ms",
        "ITL p50/p99": "-",
        "peak KV use": "12.5%",
    }


@pytest.mark.parametrize(
    ("tally", "shown"),
    [
        (LineCounts(num_answered=3), "3"),
        (LineCounts(num_answered=3, num_failed=1), "4 (1 failed)"),
        (
            LineCounts(num_answered=1, num_failed=1, num_skipped=5),
            "2 (1 failed, 5 answered before)",
        ),
    ],
)
def test_requests_are_lines_of_the_file(tally: LineCounts, shown: str) -> None:
    assert dict(summary_rows(SEEN, tally))["requests"] == shown


def test_without_a_terminal_it_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show_summary(SEEN)
    shown = capsys.readouterr()
    assert shown.err.splitlines()[0] == "requests: 1"
    assert shown.out == ""


def test_on_a_terminal_it_is_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_summary(SEEN)
    assert "┃" in capsys.readouterr().err


def test_json_has_seconds_and_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(SEEN, LineCounts(num_answered=3, num_failed=1))
    found = json.loads(capsys.readouterr().out)
    assert found["ttft_s"] == {"p50": 0.0251, "p99": 0.04}
    assert found["itl_s"] == {"p50": None, "p99": None}
    assert (found["answered"], found["tokens_per_s"]) == (3, 15.0)
