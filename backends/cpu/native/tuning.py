"""The numbers that `sagellm tune` chose for this machine, in a file beside the library of kernels.
Needs no torch.
"""

import ctypes
import tempfile
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeAlias

import msgspec

from sagellm.backends.cpu.native.compiler import is_private
from sagellm.backends.cpu.topology import CpuTopology, threads_of_environment, usable_cores
from sagellm.graphs.log import get_logger

_log = get_logger(__name__)
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class Tuning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The values of the kernels, which no result depends on: those of tuning.h."""

    rows: _Count
    panels: _Count
    ahead: _Count
    quant_ahead: _Count


class _NativeTuning(ctypes.Structure):
    """The struct of tuning.h."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        (name, ctypes.c_long) for name in Tuning.__struct_fields__
    ]

    @property
    def values(self) -> Tuning:
        return Tuning(*(getattr(self, name) for name in Tuning.__struct_fields__))


class Tuned(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tuned numbers. `threads` holds only for a process with `cpus` CPUs on `cores` cores, of
    which it may use `allowed` at once.
    """

    values: Tuning
    threads: _Count
    cores: _Count
    cpus: _Count
    allowed: _Count

    def fits(self, topology: CpuTopology) -> bool:
        """Whether `threads` holds for a process on `topology`."""
        now = topology.num_cores, topology.num_cpus, topology.num_allowed
        return now == (self.cores, self.cpus, self.allowed) and self.threads <= self.cpus


def default_threads(tuned: Tuned | None = None, topology: CpuTopology | None = None) -> int:
    """The threads of kernels where an engine has no `threads`: those of OMP_NUM_THREADS, else those
    that were tuned, else one per physical core. `topology` None: that of this process.
    """
    found = threads_of_environment()
    if found is not None:
        return found
    topology = topology or _own_topology()
    return tuned.threads if tuned and tuned.fits(topology) else topology.threads


@cache  # large machines have many files to read
def _own_topology() -> CpuTopology:
    return usable_cores()


class KernelTuning:
    """The values of the kernels of a loaded library, at first those that were tuned. `tuned`: what
    was found for this machine; None: nothing, or the kernels refuse it.
    """

    def __init__(self, library: ctypes.CDLL, path: Path) -> None:
        self._library = library
        self.tuned = read_tuned(path)
        if self.tuned and not self.use(self.tuned.values):
            _warn(tuned_file(path), "a value is out of range")
            self.tuned = None

    @property
    def used(self) -> Tuning:
        """The values that all kernels of this process use."""
        return self._values()[0]

    @property
    def default(self) -> Tuning:
        """The values that kernels use if nothing is tuned."""
        return self._values()[1]

    def use(self, values: Tuning) -> bool:
        """Let all kernels of this process use `values`. False, and no effect, if one is out of
        range.
        """
        found = _NativeTuning(*msgspec.structs.astuple(values))
        return not self._library.sage_tune_set(ctypes.byref(found))

    def _values(self) -> tuple[Tuning, Tuning]:
        used, default = _NativeTuning(), _NativeTuning()
        self._library.sage_tune_get(ctypes.byref(used), ctypes.byref(default))
        return used.values, default.values


def tuned_file(library: Path) -> Path:
    """The file of what was tuned for a library: the key of its name covers sources and CPU."""
    return library.with_name(f"tuned-{library.stem.partition('-')[2]}.json")


def read_tuned(library: Path) -> Tuned | None:
    """The tuned numbers of a library; None without a file.

    Logs a warning and returns None for a file that is damaged, or that others could have written.
    """
    path = tuned_file(library)
    cause = "others could have written it"
    try:
        if not path.is_symlink() and not path.exists():
            return None
        if is_private(path):
            return msgspec.json.decode(path.read_bytes(), type=Tuned)
    except (OSError, msgspec.DecodeError) as error:
        cause = str(error)
    _warn(path, cause)
    return None


def _warn(path: Path, cause: str) -> None:
    _log.warning("tuning_ignored", file=str(path), cause=cause, fix="run `sagellm tune` again")


def write_tuned(library: Path, tuned: Tuned) -> Path:
    """Keep what was tuned for a library, in place of what was; return the file. Raises OSError."""
    path = tuned_file(library)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fresh = Path(folder) / path.name
        fresh.write_bytes(msgspec.json.format(msgspec.json.encode(tuned)) + b"\n")
        fresh.chmod(0o600)  # the umask may allow others to write
        fresh.replace(path)
    return path


def forget_tuned(library: Path) -> bool:
    """Remove what was tuned for a library; return whether there was anything. Raises OSError."""
    path = tuned_file(library)
    was_there = path.is_symlink() or path.exists()
    path.unlink(missing_ok=True)
    return was_there
