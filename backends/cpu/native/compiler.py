"""Builds the C kernels once per machine: a shared library in the user's cache. Needs no torch."""

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
_MOST_STDERR = 2000  # the last bytes of the compiler's stderr, which hold the error, are logged
_log = get_logger(__name__)


def c_compiler() -> tuple[str, ...]:
    """The compiler's command: $CC with its arguments, else cc, gcc or clang; () without any."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # $CC has an unclosed quotation
        return ()
    for name, *arguments in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if path := shutil.which(name):
            return (path, *arguments)
    return ()


def compiled(progress: Progress = silent, flags: tuple[str, ...] = ()) -> Path | None:
    """Return the library for these sources and this CPU, and build it first if needed. Returns None
    if it cannot be built. `flags` come after the usual flags of the compiler.

    The library is loaded as code, so a file that another user could have written is never returned.
    `progress` is called before a build.
    """
    compiler = c_compiler()
    if not compiler:
        _log.info("native_kernels_absent", cause="no C compiler", fix="install gcc or clang")
        return None
    try:
        name = library_name(compiler, flags)
        found = built(name)
        return found or _built_now(compiler, name, progress, flags)
    except (OSError, subprocess.SubprocessError) as error:
        fix = f"see that {compiler[0]} works"
        _log.warning("native_kernels_absent", cause=_cause(error), fix=fix)
        return None


def built(name: str) -> Path | None:
    """The library `name` from an earlier build. None if there is none, or if another user could
    have written it.
    """
    for folder in (cache_folder(), temporary_folder()):
        if folder is not None and is_private(folder) and is_private(folder / name):
            return folder / name
    return None


def built_before() -> Path | None:
    """The library for these sources and this CPU from an earlier build. None if there is none, or
    no compiler that works.
    """
    compiler = c_compiler()
    try:
        return built(library_name(compiler)) if compiler else None
    except (OSError, subprocess.SubprocessError):
        return None


def _built_now(
    compiler: tuple[str, ...], name: str, progress: Progress, flags: tuple[str, ...]
) -> Path:
    folder, why_not = writable_folder()
    if why_not:
        fix = "see that it can be written to, or set XDG_CACHE_HOME"
        _log.warning(
            "native_kernels_in_temporary_folder", cause=why_not, folder=str(folder), fix=fix
        )
    progress(Compiling(shlex.join(compiler), str(folder)))
    began_s = monotonic()
    library = _build((*compiler, *_flags(compiler), *flags), folder / name)
    _log.info("native_kernels_built", folder=str(folder), seconds=round(monotonic() - began_s, 1))
    return library


def _cause(error: OSError | subprocess.SubprocessError) -> str:
    said = getattr(error, "stderr", None) or b""
    return f"{error} {said[-_MOST_STDERR:].decode(errors='replace')}".strip()


def _build(compiler: tuple[str, ...], library: Path) -> Path:
    """Compile in a folder next to `library`, then move the file to `library` in one step, so that
    two processes may build at once.
    """
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        fresh = Path(folder) / library.name
        command = [*compiler, "-o", str(fresh), *map(str, _sources(".c")), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
        fresh.chmod(0o700)  # the umask may allow others to write
        fresh.replace(library)
    return library


def _flags(compiler: tuple[str, ...]) -> tuple[str, ...]:
    """_FLAGS for this compiler: some compilers for ARM name the CPU by -mcpu alone."""
    named = [*compiler, "-march=native", "-fsyntax-only", "-x", "c", os.devnull]
    if not subprocess.run(named, capture_output=True, timeout=_TIMEOUT_S).returncode:
        return _FLAGS
    return tuple(flag.replace("-march=native", "-mcpu=native") for flag in _FLAGS)


def _sources(*suffixes: str) -> list[Path]:
    return sorted(path for path in _SOURCES.iterdir() if path.suffix in suffixes)


def library_name(compiler: tuple[str, ...], flags: tuple[str, ...] = ()) -> str:
    """The name of the library file for these sources, this compiler, these flags and this CPU."""
    return f"kernels-{_key(compiler, flags)}.so"


def _key(compiler: tuple[str, ...], flags: tuple[str, ...] = ()) -> str:
    """A hash of the sources, the flags, the compiler, the C library and the CPU."""
    parts = [path.read_bytes() for path in _sources(".c", ".h")]
    way = ((*_FLAGS, *flags), compiler, platform.libc_ver())
    parts += [repr(way).encode(), _version(compiler), _cpu()]
    return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()


def _version(compiler: tuple[str, ...]) -> bytes:
    said = subprocess.run([*compiler, "--version"], capture_output=True, timeout=_TIMEOUT_S)
    return said.stdout.partition(b"\n")[0]


def _cpu() -> bytes:
    """The CPU's model and features, without values that vary, such as its frequency."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    named = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}
    return "\n".join(sorted(named)).encode()


def writable_folder() -> tuple[Path, str]:
    """The folder where libraries are built, and why it is not the user's cache ("" if it is).

    The user's cache is used if only the user can write to it, else a temporary folder that only the
    user can write to. Makes the folder.
    """
    folder, why = cache_folder(), "the user has no home"
    if folder is not None:
        why = _why_unfit(folder)
        if not why:
            return folder, ""
    folder = temporary_folder()
    return (_temporary() if _why_unfit(folder) else folder), why


def _why_unfit(folder: Path) -> str:
    """Make the folder, and return why a library in it would not be safe to load ("" if it is)."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not is_private(folder):
            return f"{folder} is not this user's alone"
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder} cannot be written to: {error.strerror}"


def temporary_folder() -> Path:
    """The temporary folder that all processes of the user share until the machine restarts.

    Its name can be guessed: callers check that the folder belongs to the user before they use it.
    """
    return Path(tempfile.gettempdir()) / f"sagellm-native-{os.getuid()}"


def _temporary() -> Path:
    """Make a temporary folder that is removed when the process exits."""
    folder = tempfile.mkdtemp(prefix="sagellm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def is_private(path: Path) -> bool:
    """Whether the path exists, belongs to the user, and cannot be written by others."""
    try:
        found = path.lstat()  # this refuses links, whose own mode lets everyone write
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def cache_folder() -> Path | None:
    """The folder in the user's cache; None if the user has no home."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    except RuntimeError:
        return None
    return Path(root) / "sagellm" / "native"
