"""Building the C kernels once a machine: a shared library in the user's cache."""

import atexit
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import structlog

_SOURCES = Path(__file__).parent
_FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=off", "-pthread"),
    *("-shared", "-fPIC", "-Wno-psabi"),
)
_TIMEOUT_S = 120.0
_MOST_STDERR = 2000  # bytes of it in the log: its end, where the error is
_log = structlog.get_logger(__name__)


def c_compiler() -> tuple[str, ...]:
    """The command: $CC with its arguments, else cc, gcc or clang; () where there is none."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # a quotation that does not end
        return ()
    for name, *arguments in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if path := shutil.which(name):
            return (path, *arguments)
    return ()


def compiled() -> Path | None:
    """The library for this source and CPU, built now if need be; None if it cannot be built.

    What another user could have written is never returned.
    """
    compiler = c_compiler()
    if not compiler:
        _log.info("native_kernels_absent", cause="no C compiler", fix="install gcc or clang")
        return None
    try:
        library = _folder() / f"kernels-{_key(compiler)}.so"
        return library if _is_private(library) else _build(compiler, library)
    except (OSError, subprocess.SubprocessError) as error:
        fix = f"see that {compiler[0]} works"
        _log.warning("native_kernels_absent", cause=_cause(error), fix=fix)
        return None


def _cause(error: OSError | subprocess.SubprocessError) -> str:
    said = getattr(error, "stderr", None) or b""
    return f"{error} {said[-_MOST_STDERR:].decode(errors='replace')}".strip()


def _build(compiler: tuple[str, ...], library: Path) -> Path:
    """Compiled beside the target and moved there, so that two processes may race."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        fresh = Path(folder) / library.name
        command = [*compiler, *_FLAGS, "-o", str(fresh), *map(str, _sources(".c")), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
        fresh.chmod(0o700)  # whatever the umask
        fresh.replace(library)
    return library


def _sources(*suffixes: str) -> list[Path]:
    return sorted(path for path in _SOURCES.iterdir() if path.suffix in suffixes)


def _key(compiler: tuple[str, ...]) -> str:
    """Changes with the sources, the flags, the compiler, the C library and the CPU."""
    parts = [path.read_bytes() for path in _sources(".c", ".h")]
    parts += [repr((_FLAGS, compiler, platform.libc_ver())).encode(), _version(compiler), _cpu()]
    return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()


def _version(compiler: tuple[str, ...]) -> bytes:
    said = subprocess.run([*compiler, "--version"], capture_output=True, timeout=_TIMEOUT_S)
    return said.stdout.partition(b"\n")[0]


def _cpu() -> bytes:
    """The CPU's model and features, without what changes from moment to moment."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    named = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}
    return "\n".join(sorted(named)).encode()


def _folder() -> Path:
    """The user's cache, or where that is not safe a folder that goes with the process."""
    try:
        folder = _cache()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # read-only; a user without a home
        return _temporary()
    return folder if _is_private(folder) else _temporary()


def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="sagellm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _is_private(path: Path) -> bool:
    """Whether it is there, the user's own, and for others to write neither it nor a link to it."""
    try:
        found = path.lstat()  # a link is writable by all
    except FileNotFoundError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "sagellm" / "native"
