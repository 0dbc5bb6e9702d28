"""Building the C kernels once a machine: a shared library in the user's cache."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import structlog

_SOURCES = Path(__file__).parent
_FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=off", "-fopenmp"),
    *("-shared", "-fPIC", "-Wno-psabi"),
)
_TIMEOUT_S = 120.0
_log = structlog.get_logger(__name__)


def compiled() -> Path | None:
    """The library for this source and CPU, built now if need be; None if it cannot be built."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        _log.info("native_kernels_absent", cause="no C compiler", fix="install gcc or clang")
        return None
    library = _cache() / f"kernels-{_key(compiler)}.so"
    if library.exists():
        return library
    try:
        return _build(compiler, library)
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("native_kernels_absent", cause=str(error), fix="see that cc works")
        return None


def _build(compiler: str, library: Path) -> Path:
    """Compiled beside the target and moved there, so that two processes may race."""
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        fresh = Path(folder) / library.name
        command = [compiler, *_FLAGS, "-o", str(fresh), *map(str, _sources(".c")), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
        fresh.replace(library)
    return library


def _sources(*suffixes: str) -> list[Path]:
    return sorted(path for path in _SOURCES.iterdir() if path.suffix in suffixes)


def _key(compiler: str) -> str:
    """Changes with the sources, the flags, the compiler and the CPU."""
    parts = [path.read_bytes() for path in _sources(".c", ".h")]
    parts += [repr((_FLAGS, compiler)).encode(), _cpu()]
    return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()


def _cpu() -> bytes:
    """The CPU's model and features, without what changes from moment to moment."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    named = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}
    return "\n".join(sorted(named)).encode()


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "sagellm" / "native"
