"""The physical cores that this process may use: affinity, hyper-threads and the quota of cgroups.
Needs no torch.
"""

import importlib
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class CpuTopology:
    """The CPUs that a process may use. `cores`: the CPUs of each physical core; CPUs of one core
    are hyper-threads. `quota`: how many CPUs' time a cgroup allows; None: no limit.
    """

    cores: tuple[tuple[int, ...], ...]
    quota: float | None = None

    @property
    def num_cores(self) -> int:
        return len(self.cores)

    @property
    def num_cpus(self) -> int:
        return sum(map(len, self.cores))

    @property
    def num_allowed(self) -> int:
        """The most threads that the quota lets run at once, at least 1."""
        return self.num_cpus if self.quota is None else max(1, math.ceil(self.quota))

    @property
    def threads(self) -> int:
        """The threads for kernels: one per physical core, within the quota.

        Hyper-threads share the arithmetic units and the caches of their core, so a second thread of
        a core has little to add and much to disturb. Threads are not pinned: the kernel's scheduler
        fills idle cores before it doubles hyper-threads, and a pinned thread could not leave a core
        that another program needs.
        """
        return max(1, min(self.num_cores, self.num_allowed))

    def __str__(self) -> str:
        cores = "one core" if self.num_cores == 1 else f"{self.num_cores} cores"
        if self.num_cpus > self.num_cores:
            cores = f"{self.num_cpus} CPUs, which are hyper-threads of {cores}"
        return cores if self.quota is None else f"{cores}, with a quota of {self.quota:g} CPUs"


def usable_cores(root: Path = _ROOT, affinity: Collection[int] | None = None) -> CpuTopology:
    """The cores that this process may use. `root`: the folder that has /sys and /proc; `affinity`:
    the CPUs that the process may run on; None: as the system says.
    """
    if affinity is None:
        if not hasattr(os, "sched_getaffinity"):  # no Linux
            count = (
                importlib.import_module("psutil").cpu_count(logical=False) or os.cpu_count() or 1
            )
            return CpuTopology(tuple((cpu,) for cpu in range(count)))
        affinity = os.sched_getaffinity(0)
    folder = root / "sys/devices/system/cpu"
    online = _cpu_list(_text(folder / "online"))
    cores: dict[object, list[int]] = {}
    for cpu in sorted(set(affinity) & online or affinity):
        cores.setdefault(_core_of(folder / f"cpu{cpu}" / "topology", cpu), []).append(cpu)
    return CpuTopology(tuple(map(tuple, cores.values())), _quota(root))


def threads_of_environment(environment: Mapping[str, str] = os.environ) -> int | None:
    """The number of threads in OMP_NUM_THREADS (of nested levels, the first); None without one."""
    first = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if re.fullmatch("[0-9]{1,6}", first) and int(first) else None


def _core_of(folder: Path, cpu: int) -> object:
    """The key that the hyper-threads of one core share. A CPU without topology is a core."""
    siblings = _cpu_list(_text(folder / "thread_siblings_list"))
    if cpu in siblings:
        return frozenset(siblings)
    package, core = (_text(folder / name) for name in ("physical_package_id", "core_id"))
    return (package, core) if core.isdecimal() else cpu  # the core is -1 if it is not known


def _cpu_list(text: str) -> set[int]:
    """The CPUs of a list such as 0-3,8. Empty if the text is no such list."""
    found: set[int] = set()
    for part in text.split(","):
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        if not ends:
            return set()
        found.update(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return found


def _quota(root: Path) -> float | None:
    """The smallest quota of the process's cgroups and of the groups around them, in CPUs."""
    mount = root / "sys/fs/cgroup"
    groups = {
        group
        for folder in _cgroups(root / "proc/self/cgroup", mount)
        for group in (folder, *folder.parents)
        if group.is_relative_to(mount)
    }
    return min((quota for group in groups if (quota := _own_quota(group))), default=None)


def _cgroups(listing: Path, mount: Path) -> Iterator[Path]:
    """The folders that limit the CPU time of this process, of cgroups v1 and v2."""
    for line in _text(listing).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        inside = [part for part in path.split("/") if part not in ("", "..")]
        if not controllers:  # v2
            yield mount.joinpath(*inside)
        elif "cpu" in controllers.split(","):
            yield from (mount.joinpath(name, *inside) for name in (controllers, "cpu"))


def _own_quota(group: Path) -> float | None:
    """The quota of one cgroup, in CPUs; None without one."""
    v1 = [_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    try:
        time, period = map(float, _text(group / "cpu.max").split() or v1)
        return time / period if time > 0 and period > 0 else None
    except ValueError:  # "max", or no file
        return None


def _text(path: Path) -> str:
    """The text of a file of the system; "" without one."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
