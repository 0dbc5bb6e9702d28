"""`sagellm doctor`: whether this machine and this set-up can serve."""

from collections.abc import Mapping
from dataclasses import asdict

import msgspec
from rich.console import Console

from sagellm.cli.checks import CHECKS, Check, Finding

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def doctor(*, json: bool = False) -> int:
    """Check this machine and set-up; every line that is not ok says how to fix it.

    Parameters
    ----------
    json
        Print {"ok": ..., "checks": [{"name", "status", "detail", "fix"}]}.
    """
    findings = examine(CHECKS)
    if json:
        print(msgspec.json.encode(report(findings)).decode())
    else:
        _print(findings)
    return exit_code(findings)


def examine(checks: Mapping[str, Check]) -> dict[str, Finding]:
    """Run every check."""
    return {name: check() for name, check in checks.items()}


def exit_code(findings: Mapping[str, Finding]) -> int:
    """0, or the highest code of what failed; a warning fails nothing."""
    failed = (finding.code for finding in findings.values() if finding.status == "failed")
    return max(failed, default=0)


def report(findings: Mapping[str, Finding]) -> dict[str, object]:
    """The findings as plain data."""
    checks = [
        {key: value for key, value in {"name": name, **asdict(finding)}.items() if key != "code"}
        for name, finding in findings.items()
    ]
    return {"ok": exit_code(findings) == 0, "checks": checks}


def _print(findings: Mapping[str, Finding]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for name, finding in findings.items():
        console.print(f"{finding.status:8}", style=_STYLES[finding.status], end="")
        console.print(f"{name:10}{finding.detail}", markup=False)
        if finding.fix:
            console.print(f"{'':18}fix: {finding.fix}", markup=False)
