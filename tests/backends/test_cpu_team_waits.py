"""A thread that waits for another sleeps: it leaves its core to the thread that it waits for."""

import subprocess
import sys
from pathlib import Path

import pytest

from sagellm.backends.cpu import native
from sagellm.backends.cpu.native.compiler import c_compiler

SOURCE = Path(native.__file__).parent / "team.c"
PROGRAM = Path(__file__).parent / "team_rounds.py"
SLEEPS = {"futex": (), "condition": ("-U__linux__",)}  # the second is for systems without futexes
pytestmark = [
    pytest.mark.skipif(not c_compiler(), reason="no C compiler on this machine"),
    pytest.mark.skipif(sys.platform != "linux", reason="a test pins threads to a core"),
]


@pytest.fixture(scope="module", params=SLEEPS)
def library(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("team") / "team.so"
    flags = ("-O2", "-shared", "-fPIC", "-pthread", *SLEEPS[request.param])
    subprocess.run([*c_compiler(), *flags, str(SOURCE), "-o", str(path)], check=True)
    return path


def cpu_s(library, way, threads):
    """The CPU time of a run. Every thread has done its share, or the run fails."""
    command = [sys.executable, str(PROGRAM), str(library), way, str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)


# Threads that poll for 50 us at each barrier, and 200 us before each round, take the times in the
# comments.
@pytest.mark.parametrize(
    ("way", "threads", "most_s"),
    [
        ("one_core", 2, 0.012),  # 0.021
        ("one_core", 6, 0.060),  # 0.112
        ("many_rounds", 2, 0.030),  # 0.091
        ("many_rounds", 6, 0.220),  # 0.438
    ],
)
def test_threads_that_share_a_core_do_not_poll_in_vain(library, way, threads, most_s):
    assert min(cpu_s(library, way, threads) for _ in range(3)) < most_s


@pytest.mark.parametrize("way", ["late_at_barrier", "late_at_end"])
@pytest.mark.parametrize("threads", [2, 6])
def test_a_thread_sleeps_while_another_is_late(library, way, threads):
    assert min(cpu_s(library, way, threads) for _ in range(3)) < 0.01  # the other is late by 0.1 s


@pytest.mark.parametrize("threads", [2, 6])
def test_helpers_that_come_late_join_the_next_section(library, threads):
    cpu_s(library, "late_joins", threads)


@pytest.mark.parametrize("threads", [2, 6])
def test_helpers_sleep_until_a_section_needs_them_or_the_work_is_over(library, threads):
    assert min(cpu_s(library, "over_meeting", threads) for _ in range(3)) < 0.01


@pytest.mark.parametrize("threads", [2, 6])
def test_helpers_without_a_core_miss_an_open_round(library, threads):
    cpu_s(library, "missed_rounds", threads)
