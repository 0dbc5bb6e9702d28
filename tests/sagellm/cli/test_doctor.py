import json
import shutil
from pathlib import Path

import pytest

from sagellm.backends.cpu.native.compiler import c_compiler, library_name, temporary_folder
from sagellm.backends.cpu.native.tuning import Tuned, Tuning, write_tuned
from sagellm.backends.cpu.topology import CpuTopology
from sagellm.cli import doctor as checks
from sagellm.cli import main
from sagellm.cli.doctor import CHECKS, Finding, doctor, exit_code, report, run_checks
from sagellm.runtime.models import HelperUnavailable
from sagellm.runtime.models.isolated import IsolatedTemplate

OK = Finding("ok", "fine")
SLOW = Finding("warning", "slow", "be quick")
OLD = Finding("failed", "old", "renew it")
FULL = Finding("failed", "full", "tidy up", code=3)


def test_every_check_says_how_to_fix_what_it_finds() -> None:
    for name, finding in run_checks(CHECKS).items():
        assert finding.detail, name
        assert (finding.status == "ok") != bool(finding.fix), name


@pytest.mark.parametrize(
    ("findings", "code"), [([OK, OK], 0), ([OK, SLOW], 0), ([OLD, OK], 2), ([OLD, FULL], 3)]
)
def test_the_exit_code_is_that_of_the_worst(findings: list[Finding], code: int) -> None:
    assert exit_code(dict(zip("ab", findings, strict=True))) == code


def test_a_report_has_no_exit_codes_in_it() -> None:
    assert report({"a": FULL}) == {
        "ok": False,
        "checks": [{"name": "a", "status": "failed", "detail": "full", "fix": "tidy up"}],
    }


def test_doctor_prints_each_check_with_its_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sagellm.cli.doctor.CHECKS", {"a": lambda: OK, "disk": lambda: FULL})
    assert doctor() == 3
    shown = capsys.readouterr().out
    assert shown == "ok      a         fine\nfailed  disk      full\n" + " " * 18 + "fix: tidy up\n"


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == (code == 0)
    assert {"python", "torch", "memory", "disk", "limits", "model"} <= {
        check["name"] for check in found["checks"]
    }


def test_an_old_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "installed", lambda name: "3.1.2")
    monkeypatch.setattr(checks, "TOO_OLD", (("jinja2", (3, 1, 6), "leaves the sandbox"),))
    finding = CHECKS["versions"]()
    assert (finding.status, finding.detail) == ("failed", "jinja2 3.1.2: leaves the sandbox")


def test_a_local_build_of_a_package_is_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "installed", lambda name: "2.11.0+cpu")
    monkeypatch.setattr(checks, "TOO_OLD", (("torch", (2, 11), "old"),))
    assert CHECKS["versions"]().status == "ok"


TWO_CORES = CpuTopology(((0,), (1,)))
SIBLINGS = CpuTopology(((0, 1),))


@pytest.mark.parametrize(
    ("topology", "omp", "status", "detail", "fix"),
    [
        (TWO_CORES, "", "ok", "2 threads on 2 cores", ""),
        (TWO_CORES, "1", "ok", "1 thread on 2 cores", ""),
        (SIBLINGS, "", "ok", "1 thread on 2 CPUs, which are hyper-threads of one core", ""),
        (
            *(SIBLINGS, "2", "warning"),
            "2 threads on 2 CPUs, which are hyper-threads of one core: hyper-threads share the "
            "arithmetic units of their core",
            "export OMP_NUM_THREADS=1, or unset it",
        ),
        (
            *(TWO_CORES, "3", "warning", "3 threads on 2 cores: threads take turns on a CPU"),
            "export OMP_NUM_THREADS=2, or unset it",
        ),
        (
            *(CpuTopology(((0,), (1,), (2,)), 1.5), "3", "warning"),
            "3 threads on 3 cores, with a quota of 1.5 CPUs: threads beyond the quota are stopped "
            "again and again",
            "export OMP_NUM_THREADS=2, or unset it",
        ),
        (
            *(CpuTopology(((0, 4), (1, 5)), 8.0), "", "ok"),
            "2 threads on 4 CPUs, which are hyper-threads of 2 cores, with a quota of 8 CPUs",
            "",
        ),
    ],
)
def test_threads_are_compared_with_physical_cores_and_quota(
    monkeypatch: pytest.MonkeyPatch,
    topology: CpuTopology,
    omp: str,
    status: str,
    detail: str,
    fix: str,
) -> None:
    monkeypatch.setattr(checks, "usable_cores", lambda: topology)
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setenv("CC", "no-such-compiler")  # nothing is tuned
    found = CHECKS["threads"]()
    assert (found.status, found.detail, found.fix) == (status, detail, fix)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A library of kernels, for which nothing is tuned, in a cache of its own."""
    monkeypatch.setenv("CC", "echo")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(checks, "usable_cores", lambda: SIBLINGS)
    path = tmp_path / "sagellm" / "native" / library_name(c_compiler())
    path.parent.mkdir(parents=True, mode=0o700)
    path.touch(0o700)
    return path


TUNED = Tuned(
    Tuning(rows=32, panels=2, ahead=512, quant_ahead=1024), threads=2, cores=1, cpus=2, allowed=2
)


def test_a_machine_that_is_not_tuned_is_fine(library: Path) -> None:
    found = CHECKS["tuning"]()
    assert (found.status, found.detail) == (
        "ok",
        "not tuned, with defaults: `sagellm tune` measures what suits it",
    )


def test_what_was_tuned_is_shown_and_gives_the_threads(library: Path) -> None:
    write_tuned(library, TUNED)
    found = CHECKS["tuning"]()
    assert (found.status, found.detail) == (
        "ok",
        "tuned: threads 2, rows 32, panels 2, ahead 512, quant_ahead 1024",
    )
    assert CHECKS["threads"]().status == "ok"
    assert CHECKS["threads"]().detail.startswith("2 threads on 2 CPUs")


def test_threads_that_were_tuned_on_other_cpus_are_found(
    monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    write_tuned(library, TUNED)
    monkeypatch.setattr(checks, "usable_cores", lambda: TWO_CORES)
    found = CHECKS["tuning"]()
    assert found.status == "warning"
    assert found.detail.endswith("the threads were found with other CPUs, and are not used")
    assert found.fix == "sagellm tune"


def test_a_damaged_file_of_what_was_tuned_is_found(library: Path) -> None:
    write_tuned(library, TUNED).write_text("{")
    found = CHECKS["tuning"]()
    assert (found.status, found.fix) == ("warning", "sagellm tune")
    assert found.detail.endswith(".json is ignored")


def test_the_compiler_is_the_one_that_the_kernels_are_built_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert CHECKS["compiler"]().status == "warning"
    monkeypatch.setenv("CC", "echo --fast")
    assert CHECKS["compiler"]().detail == f"{shutil.which('echo')} --fast: --fast --version"


def test_the_kernels_are_where_they_are_said_to_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CC", "echo")
    folder = tmp_path / "sagellm" / "native"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert CHECKS["kernels"]().detail == f"compiled at the first start, to {folder}"
    library = folder / library_name(c_compiler())
    library.touch(0o700)
    assert CHECKS["kernels"]().detail == f"compiled, in {folder}"
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    found = CHECKS["kernels"]()
    assert found.status == "warning"
    assert "/dev/null/sagellm/native cannot be written to" in found.detail
    assert str(temporary_folder()) in found.detail


@pytest.mark.parametrize(
    ("soft", "hard", "status"),
    [(256, 256, "failed"), (1024, 1024, "warning"), (256, 4096, "ok"), (1024, -1, "ok")],
)
def test_the_limit_of_open_files(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, status: str
) -> None:
    """The hard limit counts: `serve` raises the soft limit to it."""
    monkeypatch.setattr("resource.getrlimit", lambda which: (soft, hard))
    assert CHECKS["limits"]().status == status


def test_a_machine_that_stops_no_template_is_found(monkeypatch):
    def forget(*asked):
        raise HelperUnavailable("no helper process could be started")

    assert CHECKS["templates"]().detail.endswith("0.25 s of CPU time, and have 256 MiB of memory")
    monkeypatch.setattr(IsolatedTemplate, "render", lambda *asked: "")
    assert CHECKS["templates"]().status == "failed"
    monkeypatch.setattr(IsolatedTemplate, "render", forget)
    assert "ulimit -u" in CHECKS["templates"]().fix
