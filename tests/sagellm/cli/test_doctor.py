import json
import shutil
from pathlib import Path

import pytest

from sagellm.backends.cpu.native.compiler import c_compiler, library_name, temporary_folder
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


def test_too_many_threads_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_usable_cores", lambda: 0)
    assert CHECKS["threads"]().fix == "export OMP_NUM_THREADS=0"


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
