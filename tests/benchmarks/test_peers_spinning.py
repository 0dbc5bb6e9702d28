import os
import signal
import subprocess
import sys
import time

import psutil
from child_processes import children

from benchmarks.peers.models import DRIVERS
from benchmarks.peers.spinning import Spinning


def cpu_s(processes: list[psutil.Process]) -> list[float]:
    return [process.cpu_times().user for process in processes]


def test_every_process_spins_inside_the_block_and_none_after_it() -> None:
    others = children()
    with Spinning(2):
        spinning = list(children() - others)
        before, until = cpu_s(spinning), time.monotonic() + 20
        while min(now - then for now, then in zip(cpu_s(spinning), before, strict=True)) < 0.02:
            assert time.monotonic() < until, "a process uses no CPU"
            time.sleep(0.01)
    assert len(spinning) == 2
    assert not any(process.is_running() for process in spinning)


def test_none_is_asked_for_and_none_is_there() -> None:
    others = children()
    with Spinning(0):
        assert children() == others


PARENT = """
import time
import psutil
from benchmarks.peers.spinning import Spinning
with Spinning(2):
    print(*[child.pid for child in psutil.Process().children()], flush=True)
    time.sleep(60)
"""


def test_no_process_outlives_a_killed_measurement() -> None:
    command, root = [sys.executable, "-c", PARENT], str(DRIVERS.parents[2])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        assert parent.stdout is not None
        spinning = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        os.kill(parent.pid, signal.SIGKILL)
    assert len(spinning) == 2
    gone, alive = psutil.wait_procs(spinning, timeout=10)
    assert (len(gone), alive) == (2, [])
