"""`sagellm doctor`: checks whether this machine and this installation can serve models."""

import hashlib
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires
from importlib.metadata import version as installed
from importlib.resources import files
from pathlib import Path
from typing import Literal

import msgspec
import psutil
import torch
from rich.console import Console

from sagellm.backends.cpu.native.compiler import (
    built,
    built_before,
    c_compiler,
    library_name,
    writable_folder,
)
from sagellm.backends.cpu.native.tuning import default_threads, read_tuned, tuned_file
from sagellm.backends.cpu.topology import threads_of_environment, usable_cores
from sagellm.cli.errors import CONFIGURATION, RESOURCES
from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.text import yaml
from sagellm.opening.sources import shipped_file, shipped_names
from sagellm.runtime.models import HelperUnavailable, LimitExceeded
from sagellm.runtime.models.isolated import RENDER_BYTES, RENDER_CPU_S, IsolatedTemplate

GIB = 1 << 30
_LINE_END = "\n"
_ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MIN_FREE_BYTES = 2 * GIB  # for torch, sage-tiny and a pool of KV blocks
MIN_OPEN_FILES = 1024
GOOD_OPEN_FILES = 4096  # a connection takes one file; 1,000 clients at once are common

# Packages with versions that are known to fail here: package, first good version, effect.
TOO_OLD = (
    ("torch", (2, 11), "kernels are called that it does not have"),
    ("jinja2", (3, 1, 6), "a chat template can leave the sandbox (CVE-2025-27516)"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. `fix`: empty for "ok"; `code`: the exit code for "failed"."""

    status: Literal["ok", "warning", "failed"]
    detail: str
    fix: str = ""
    code: int = CONFIGURATION


Check = Callable[[], Finding]


_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def doctor(*, json: bool = False) -> int:
    """Check this machine and set-up; every line that is not ok says how to fix it.

    Parameters
    ----------
    json
        Print {"ok": ..., "checks": [{"name", "status", "detail", "fix"}]}.
    """
    findings = run_checks(CHECKS)
    if json:
        print(msgspec.json.encode(report(findings)).decode())
    else:
        _print(findings)
    return exit_code(findings)


def run_checks(checks: Mapping[str, Check]) -> dict[str, Finding]:
    """Run every check; returns name -> finding."""
    return {name: check() for name, check in checks.items()}


def exit_code(findings: Mapping[str, Finding]) -> int:
    """The highest exit code of the failed checks, or 0. Warnings do not count."""
    failed = (finding.code for finding in findings.values() if finding.status == "failed")
    return max(failed, default=0)


def report(findings: Mapping[str, Finding]) -> dict[str, object]:
    """The findings as an object for JSON."""
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


def _python() -> Finding:
    found = f"{platform.python_implementation()} {platform.python_version()}"
    if sys.implementation.name != "cpython":
        return Finding("warning", found, "use CPython: nothing else is tested")
    return Finding("ok", found)


def _packages() -> Finding:
    """Check that all declared dependencies are installed, except those of extras."""
    declared = [text for text in requires("sagellm") or () if "extra ==" not in text]
    names = [match[0] for text in declared if (match := re.match(r"[\w.-]+", text))]
    missing = [name for name in names if _version(name) is None]
    if missing:
        return Finding("failed", f"missing: {', '.join(missing)}", "make setup")
    return Finding("ok", f"all {len(names)} are installed")


def _versions() -> Finding:
    bad = [
        f"{name} {'.'.join(map(str, found))}: {effect}"
        for name, good, effect in TOO_OLD
        if (found := _version(name)) is not None and found < good
    ]
    if bad:
        return Finding("failed", "; ".join(bad), "make setup, or upgrade these packages")
    return Finding("ok", "no known bad ones")


def _version(name: str) -> tuple[int, ...] | None:
    try:
        return tuple(int(part) for part in re.findall(r"\d+", installed(name).split("+")[0])[:3])
    except PackageNotFoundError:
        return None


def _torch() -> Finding:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        fix = "install the torch of the Python package index"
        return Finding("warning", f"{torch.__version__}, without oneDNN: slow", fix)
    return Finding("ok", f"{torch.__version__}, oneDNN")


def _cpu() -> Finding:
    capability = torch.backends.cpu.get_cpu_capability()
    found = f"{cpu_name()}, {capability}"
    if capability == "DEFAULT":
        fix = "use a machine with AVX2 or NEON; this one will be very slow"
        return Finding("warning", found, fix)
    return Finding("ok", found)


def cpu_name() -> str:
    """The name of this machine's CPU."""
    listing = Path("/proc/cpuinfo")
    text = listing.read_text() if listing.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    # platform.processor() is empty on many systems.
    return match[1] if match else platform.processor() or platform.machine()


def _threads() -> Finding:
    """Check the number of threads against the physical cores and the quota of CPU time."""
    topology, library = usable_cores(), built_before()
    threads = default_threads(read_tuned(library) if library else None, topology)
    found = f"{threads} {'thread' if threads == 1 else 'threads'} on {topology}"
    fix = f"export OMP_NUM_THREADS={topology.threads}, or unset it"
    if topology.quota is not None and threads > topology.num_allowed:
        cause = "threads beyond the quota are stopped again and again"
    elif threads > topology.num_cpus:
        cause = "threads take turns on a CPU"
    elif threads > topology.num_cores and threads_of_environment():
        cause = "hyper-threads share the arithmetic units of their core"
    else:
        return Finding("ok", found)
    return Finding("warning", f"{found}: {cause}", fix)


def _tuning() -> Finding:
    """Show what `sagellm tune` found for this machine."""
    library = built_before()
    if library is None or not tuned_file(library).exists():
        return Finding("ok", "not tuned, with defaults: `sagellm tune` measures what suits it")
    tuned = read_tuned(library)
    if tuned is None:
        return Finding("warning", f"{tuned_file(library)} is ignored", "sagellm tune")
    values = {"threads": tuned.threads, **msgspec.structs.asdict(tuned.values)}
    found = "tuned: " + ", ".join(f"{name} {value}" for name, value in values.items())
    if not tuned.fits(usable_cores()):
        cause = "the threads were found with other CPUs, and are not used"
        return Finding("warning", f"{found}; {cause}", "sagellm tune")
    return Finding("ok", found)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available < MIN_FREE_BYTES:
        fix = "stop other programs, or give the engines fewer KV blocks"
        return Finding("failed", found, fix, RESOURCES)
    return Finding("ok", found)


def _disk() -> Finding:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    found = f"{free / GIB:.1f} GiB free for temporary files"
    if free < GIB:
        return Finding("failed", found, "free some disk space, or set TMPDIR", RESOURCES)
    return Finding("ok", found)


def _open_files() -> Finding:
    """Check the hard limit of open files: `serve` raises the soft limit to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 0:  # no limit
        return Finding("ok", "as many open files as are wanted")
    found = f"{hard} open files at once, for serve ({soft} for others)"
    if hard < MIN_OPEN_FILES:
        fix = f"raise the hard limit: ulimit -Hn {GOOD_OPEN_FILES} as root, LimitNOFILE= of systemd"
        return Finding("failed", found, fix, RESOURCES)
    if hard < GOOD_OPEN_FILES:
        fix = f"as many connections: raise it for more (ulimit -Hn {GOOD_OPEN_FILES}, LimitNOFILE=)"
        return Finding("warning", found, fix)
    return Finding("ok", found)


def _compiler() -> Finding:
    found = c_compiler()
    if not found:
        fix = "install a C compiler (gcc or clang) for the faster kernels"
        return Finding("warning", "none", fix)
    try:
        done = subprocess.run([*found, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("warning", f"{shlex.join(found)}: {error}", "install gcc or clang")
    return Finding("ok", f"{shlex.join(found)}: {done.stdout.partition(_LINE_END)[0]}")


def _kernels() -> Finding:
    """Check the compiled kernels: find their file, or the folder for the first start to write."""
    compiler = c_compiler()
    if not compiler:
        return Finding("warning", "none: torch computes, slower", "install gcc or clang")
    try:
        library = built(library_name(compiler))
        folder, why_not = writable_folder()
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("warning", f"none: {error}", "install gcc or clang")
    found = (
        f"compiled, in {library.parent}" if library else f"compiled at the first start, to {folder}"
    )
    if why_not:
        fix = "see that the folder can be written to, or set XDG_CACHE_HOME"
        return Finding("warning", f"{why_not}: {found}", fix)
    return Finding("ok", found)


def _graphs() -> Finding:
    """Check that the shipped graphs can be parsed. Their `imports` are not imported."""
    try:
        names = [yaml.load_file(shipped_file(name)).graph.name for name in shipped_names()]
    except GraphError as error:
        return Finding("failed", str(error), "reinstall sagellm: make setup")
    if not names:
        return Finding("failed", "none", "reinstall sagellm: make setup")
    return Finding("ok", ", ".join(names))


def _model() -> Finding:
    """Check that the shipped model exists, and show a hash of its files."""
    folder = Path(str(files("sagellm.runtime"))) / "models" / "sage_tiny"
    if not (folder / "model.safetensors").is_file():
        return Finding("failed", "sage-tiny is missing", "reinstall sagellm: make setup")
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return Finding("ok", f"sage-tiny {digest.hexdigest()[:16]}")


def _templates() -> Finding:
    """Check that the sandbox stops a chat template that never ends."""
    template = IsolatedTemplate("", _ENDLESS, {})
    try:
        template.render([{"role": "user", "content": ""}])
    except LimitExceeded:
        pass
    except HelperUnavailable as error:
        return Finding("failed", str(error), "raise the limit of processes: ulimit -u", RESOURCES)
    else:
        return Finding("failed", "a template was not stopped", "use Linux: its limits are tested")
    finally:
        template.sandbox.close()  # ends the helper process
    found = f"helper processes are stopped after {RENDER_CPU_S:g} s of CPU time"
    if sys.platform != "linux":
        fix = "take models from those you trust: this system limits no memory of a process"
        return Finding("warning", found, fix)
    return Finding("ok", f"{found}, and have {RENDER_BYTES >> 20} MiB of memory")


CHECKS: dict[str, Check] = {
    "python": _python,
    "packages": _packages,
    "versions": _versions,
    "torch": _torch,
    "cpu": _cpu,
    "threads": _threads,
    "memory": _memory,
    "disk": _disk,
    "limits": _open_files,
    "compiler": _compiler,
    "kernels": _kernels,
    "tuning": _tuning,
    "graphs": _graphs,
    "model": _model,
    "templates": _templates,
}
