import json
import os
from pathlib import Path

import pytest

from sagellm.backends.cpu.native.compiler import compiled
from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.cpu.native.tuning import Tuned, Tuning, read_tuned, tuned_file
from sagellm.backends.cpu.tuner import TuningChoice
from sagellm.cli import main, tune

TUNED = Tuned(
    Tuning(rows=64, panels=4, ahead=4096, quant_ahead=4096), threads=3, cores=3, cpus=3, allowed=3
)
CHOICES = [
    TuningChoice("threads", 3, 3, {1: 2.5, 2: 1.25, 3: 1.0}),
    TuningChoice("panels", 4, 4, {}),
    TuningChoice("ahead", 4096, 4096, {1024: 1.01, 4096: 1.0}),
    TuningChoice("rows", 48, 64, {48: 1.0, 64: 0.9}),
    TuningChoice("quant_ahead", 4096, 4096, {4096: 1.0}),
]

needs_kernels = pytest.mark.skipif(native_kernels() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def _idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle machine, where the user asked for no number of threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The library of the kernels in a cache of its own, so that nothing is tuned."""
    found = compiled()
    assert found is not None
    path = tmp_path / "sagellm" / "native" / found.name
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_bytes(found.read_bytes())
    path.chmod(0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Measuring finds CHOICES; the seconds that it may take."""
    asked: list[float] = []

    def measured(kernels: object, seconds: float) -> tuple[Tuned, list[TuningChoice]]:
        asked.append(seconds)
        return TUNED, CHOICES

    monkeypatch.setattr(tune, "measured", measured)
    return asked


@needs_kernels
def test_real_kernels_are_measured_within_a_budget(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sagellm.backends.cpu.tuner._WEIGHT_BYTES", 32 << 20)
    assert main(["tune", "--seconds", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tuned = read_tuned(library)
    assert tuned is not None
    assert found["file"] == str(tuned_file(library))
    assert found["values"] == {
        "threads": tuned.threads,
        "rows": tuned.values.rows,
        "panels": tuned.values.panels,
        "ahead": tuned.values.ahead,
        "quant_ahead": tuned.values.quant_ahead,
    }
    assert [choice["name"] for choice in found["choices"]] == list(tune.LABELS)
    assert 1 <= tuned.threads <= tuned.cpus == len(os.sched_getaffinity(0))


@needs_kernels
def test_what_was_found_is_printed_with_the_reasons_and_kept(
    library: Path, measured: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "threads           3      the default (time with 1: 2.50, 2: 1.25)",
        "panels of a row   4      the default: there was no time to measure others",
        "bytes prefetched  4096   the default (time with 1024: 1.01)",
        "rows of a block   64     in place of 48 (time with 64: 0.90)",
        "of quantised      4096   the only choice",
        f"kept in {tuned_file(library)}",
    ]
    assert shown.err == ""
    assert measured == [20.0]
    assert read_tuned(library) == TUNED


@needs_kernels
def test_a_second_result_replaces_the_first(library: Path, measured: list[float]) -> None:
    main(["tune"])
    tuned_file(library).write_text("{")
    assert main(["tune"]) == 0
    assert read_tuned(library) == TUNED


@needs_kernels
def test_reset_forgets_what_was_found(
    library: Path, measured: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["tune"])
    capsys.readouterr()
    assert main(["tune", "--reset"]) == 0
    assert capsys.readouterr().out == "forgotten: the defaults are used\n"
    assert read_tuned(library) is None
    assert main(["tune", "--reset", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"forgotten": False}
    assert len(measured) == 1


@needs_kernels
def test_a_busy_machine_and_a_users_threads_are_warned_of(
    library: Path,
    measured: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["tune"]) == 0
    warned = capsys.readouterr().err
    assert "other programs are busy (load 99.0 on" in warned
    assert "OMP_NUM_THREADS=1 is set, and wins" in warned


def test_a_machine_without_a_compiler_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "native_kernels", lambda progress: None)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert main(["tune"]) == 2
    shown = capsys.readouterr()
    assert "no C compiler" in shown.err
    assert "fix: install gcc or clang" in shown.err
    assert shown.out == ""


def test_a_compiler_that_builds_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "native_kernels", lambda progress: None)
    monkeypatch.setenv("CC", "echo")
    assert main(["tune"]) == 2
    assert "the kernels cannot be built" in capsys.readouterr().err


@pytest.mark.parametrize("is_there", [False, True])
def test_nothing_is_forgotten_without_a_compiler_that_starts(
    tmp_path: Path,
    is_there: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compiler = tmp_path / "compiler"
    if is_there:
        compiler.write_text("#!/no/such/interpreter\n")
        compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    assert main(["tune", "--reset"]) == 0
    assert capsys.readouterr().out == "nothing was tuned\n"


@pytest.mark.parametrize("seconds", ["0", "61", "soon"])
def test_a_wrong_time_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--seconds", seconds]) == 2
    assert "--seconds" in capsys.readouterr().err
