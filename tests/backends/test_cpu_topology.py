"""Physical cores of made-up machines: hyper-threads, quotas of cgroups, affinity, offline CPUs."""

import os
from pathlib import Path

import pytest

from sagellm.backends.cpu.topology import CpuTopology, threads_of_environment, usable_cores


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def machine(root: Path, siblings: list[str], online: str = "") -> Path:
    """A machine whose CPU i has the thread_siblings_list siblings[i]; "": CPU i is offline."""
    cpus = "sys/devices/system/cpu"
    write(root, {f"{cpus}/online": online or f"0-{len(siblings) - 1}"})
    for cpu, listed in enumerate(siblings):
        if listed:
            write(root, {f"{cpus}/cpu{cpu}/topology/thread_siblings_list": listed})
    return root


HYPER = ["0,4", "1,5", "2,6", "3,7"] * 2  # 4 cores with 2 hyper-threads each


def test_hyper_threads_are_counted_once(tmp_path: Path) -> None:
    found = usable_cores(machine(tmp_path, HYPER), range(8))
    assert found == CpuTopology(((0, 4), (1, 5), (2, 6), (3, 7)))
    assert (found.num_cores, found.num_cpus, found.threads) == (4, 8, 4)


def test_without_hyper_threads_each_cpu_is_a_core(tmp_path: Path) -> None:
    assert usable_cores(machine(tmp_path, ["0", "1", "2"]), range(3)).threads == 3


def test_two_hyper_threads_of_one_core_are_one_core(tmp_path: Path) -> None:
    found = usable_cores(machine(tmp_path, HYPER), {1, 5})
    assert (found.cores, found.threads) == (((1, 5),), 1)


def test_one_hyper_thread_each_of_two_cores_is_two_cores(tmp_path: Path) -> None:
    assert usable_cores(machine(tmp_path, HYPER), {1, 6}).cores == ((1,), (6,))


def test_ranges_of_siblings_are_read(tmp_path: Path) -> None:
    assert usable_cores(machine(tmp_path, ["0-1", "0-1", "2-3", "2-3"]), range(4)).threads == 2


def test_an_offline_cpu_is_not_used(tmp_path: Path) -> None:
    root = machine(tmp_path, ["0", "", "2", "3"], online="0,2-3")
    assert usable_cores(root, range(4)).cores == ((0,), (2,), (3,))


def test_package_and_core_tell_hyper_threads_where_siblings_are_not_listed(tmp_path: Path) -> None:
    for cpu, (package, core) in enumerate([(0, 0), (0, 0), (1, 0), (1, 0)]):
        folder = f"sys/devices/system/cpu/cpu{cpu}/topology"
        write(tmp_path, {f"{folder}/physical_package_id": str(package)})
        write(tmp_path, {f"{folder}/core_id": str(core)})
    assert usable_cores(tmp_path, range(4)).cores == ((0, 1), (2, 3))


@pytest.mark.parametrize("core", ["-1", "nonsense", ""])
def test_a_core_that_is_not_known_is_one_of_its_own(tmp_path: Path, core: str) -> None:
    for cpu in range(2):
        write(tmp_path, {f"sys/devices/system/cpu/cpu{cpu}/topology/core_id": core})
    assert usable_cores(tmp_path, range(2)).threads == 2


def test_a_machine_without_topology_files_has_as_many_cores_as_cpus(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, {0, 1, 5}) == CpuTopology(((0,), (1,), (5,)))


QUOTAS = {
    "v2": {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"},
    "v2 of a parent": {
        "proc/self/cgroup": "0::/a/b",
        "sys/fs/cgroup/a/cpu.max": "150000 100000",
        "sys/fs/cgroup/a/b/cpu.max": "max 100000",
    },
    "v2, the smallest": {
        "proc/self/cgroup": "0::/a/b",
        "sys/fs/cgroup/a/cpu.max": "300000 100000",
        "sys/fs/cgroup/a/b/cpu.max": "150000 100000",
    },
    "v2, the path of the host": {
        "proc/self/cgroup": "0::/../../docker/1234",
        "sys/fs/cgroup/cpu.max": "150000 100000",
    },
    "v1": {
        "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/a\n0::/",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "75000",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "50000",
    },
    "v1 in a container": {
        "proc/self/cgroup": "4:cpuacct,cpu:/docker/1234",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    },
}


@pytest.mark.parametrize("files", QUOTAS.values(), ids=QUOTAS)
def test_a_quota_is_rounded_up_to_threads(tmp_path: Path, files: dict[str, str]) -> None:
    write(machine(tmp_path, HYPER), files)
    found = usable_cores(tmp_path, range(8))
    assert (found.quota, found.num_allowed, found.threads) == (1.5, 2, 2)


def test_a_quota_below_one_cpu_still_allows_a_thread(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "10000 100000"})
    assert usable_cores(tmp_path, range(8)).threads == 1


def test_a_quota_above_the_cores_adds_no_thread(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "800000 100000"})
    assert usable_cores(machine(tmp_path, HYPER), range(8)).threads == 4


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"},
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "rubbish"},
        {"proc/self/cgroup": "rubbish"},
        {
            "proc/self/cgroup": "4:cpu:/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    ],
)
def test_no_quota_is_no_limit(tmp_path: Path, files: dict[str, str]) -> None:
    write(tmp_path, files)
    assert usable_cores(tmp_path, range(3)) == CpuTopology(((0,), (1,), (2,)))


def test_this_machine_has_cores() -> None:
    found = usable_cores()
    assert 1 <= found.threads <= found.num_cores <= found.num_cpus
    if hasattr(os, "sched_getaffinity"):
        assert found.num_cpus == len(os.sched_getaffinity(0))


def test_a_system_without_affinity_has_what_psutil_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 6)
    assert usable_cores().threads == 6
    monkeypatch.setattr("psutil.cpu_count", lambda logical: None)
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert usable_cores().threads == 1


@pytest.mark.parametrize(
    ("text", "threads"),
    [("3", 3), ("4,2", 4), (" 5 ", 5), ("", None), ("0", None), ("-1", None), ("many", None)],
)
def test_the_number_of_threads_in_the_environment(text: str, threads: int | None) -> None:
    assert threads_of_environment({"OMP_NUM_THREADS": text}) == threads


def test_an_environment_without_a_number_of_threads() -> None:
    assert threads_of_environment({}) is None
