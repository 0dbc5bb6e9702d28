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
from time import monotonic

from sagellm.backends.interface import Compiling, Progress, silent
from sagellm.graphs.log import get_logger

_SOURCES = Path(__file__).parent
_FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=off", "-pthread"),
    *("-shared", "-fPIC", "-Wno-psabi"),
)
_TIMEOUT_S = 120.0
_MOST_STDERR = 2000  # bytes of it in the log: its end, where the error is
_log = get_logger(__name__)


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


def compiled(progress: Progress = silent) -> Path | None:
    """The library for this source and CPU, built now if need be; None if it cannot be built.

    What another user could have written is never returned. `progress` hears of a build.
    """
    compiler = c_compiler()
    if not compiler:
        _log.info("native_kernels_absent", cause="no C compiler", fix="install gcc or clang")
        return None
    try:
        name = library_name(compiler)
        found = built(name)
        return found or _built_now(compiler, name, progress)
    except (OSError, subprocess.SubprocessError) as error:
        fix = f"see that {compiler[0]} works"
        _log.warning("native_kernels_absent", cause=_cause(error), fix=fix)
        return None


def built(name: str) -> Path | None:
    """The library of that name where an earlier start has built it, and nobody else can have."""
    for folder in (cache_folder(), temporary_folder()):
        if folder is not None and _is_private(folder) and _is_private(folder / name):
            return folder / name
    return None


def _built_now(compiler: tuple[str, ...], name: str, progress: Progress) -> Path:
    folder, why_not = writable_folder()
    if why_not:
        fix = "see that it can be written to, or set XDG_CACHE_HOME"
        _log.warning(
            "native_kernels_in_temporary_folder", cause=why_not, folder=str(folder), fix=fix
        )
    progress(Compiling(shlex.join(compiler), str(folder)))
    began_s = monotonic()
    library = _build(compiler, folder / name)
    _log.info("native_kernels_built", folder=str(folder), seconds=round(monotonic() - began_s, 1))
    return library


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


def library_name(compiler: tuple[str, ...]) -> str:
    """Of the file for this source, compiler and CPU."""
    return f"kernels-{_key(compiler)}.so"


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


def writable_folder() -> tuple[Path, str]:
    """Where libraries are built, and why not in the user's cache, or "": there where that can be
    written to by its user alone, else in a temporary folder of the same kind.
    """
    folder, why = cache_folder(), "the user has no home"
    if folder is not None:
        why = _why_unfit(folder)
        if not why:
            return folder, ""
    folder = temporary_folder()
    return (_temporary() if _why_unfit(folder) else folder), why


def _why_unfit(folder: Path) -> str:
    """Why nothing can be built there that is safe to load; the folder is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _is_private(folder):
            return f"{folder} is not this user's alone"
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder} cannot be written to: {error.strerror}"


def temporary_folder() -> Path:
    """One for all processes of the user: what is built there is found until the machine ends. Its
    name can be foreseen, so it is used only where it is the user's own.
    """
    return Path(tempfile.gettempdir()) / f"sagellm-native-{os.getuid()}"


def _temporary() -> Path:
    """One that goes with the process."""
    folder = tempfile.mkdtemp(prefix="sagellm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _is_private(path: Path) -> bool:
    """Whether it is there, the user's own, and for others to write neither it nor a link to it."""
    try:
        found = path.lstat()  # a link is writable by all
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def cache_folder() -> Path | None:
    """The user's; None where there is no home."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    except RuntimeError:
        return None
    return Path(root) / "sagellm" / "native"
