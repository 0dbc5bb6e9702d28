"""The limits of a helper process, and how it ends beyond them."""

import signal
import subprocess
import sys

import pytest

from sagellm.runtime.models import helper_process

WATCHED = """
from sagellm.runtime.models import helper_main as limits
limits._IS_LINUX = False
limits._taken_bytes = lambda: len(held)
held = bytearray(10)
memory = limits.MemoryLimit()
memory.allow(100)
held += bytes(80)
memory.reset_baseline()
memory.allow(100)
held += bytes(90)
print("within", flush=True)
held += bytes(90)
while True: pass
"""


def test_where_the_system_has_no_limit_of_memory_a_thread_ends_the_process() -> None:
    found = subprocess.run([sys.executable, "-c", WATCHED], stdout=subprocess.PIPE, timeout=20)
    assert found.stdout == b"within\n"
    assert found.returncode == helper_process.OUT_OF_MEMORY


@pytest.mark.parametrize("work", ["while True: pass", "len(str(9 ** 9 ** 8))"])
def test_cpu_time_is_bounded_inside_a_call_too(work: str) -> None:
    code = (
        f"from sagellm.runtime.models.helper_main import limit_cpu\nwith limit_cpu(0.05):\n {work}"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=20).returncode == -signal.SIGPROF


def test_a_block_that_ends_in_time_is_not_killed_later() -> None:
    code = (
        "from sagellm.runtime.models.helper_main import limit_cpu\nimport time\n"
        "with limit_cpu(0.05): pass\n"
        "while time.process_time() < 0.3: pass"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=20).returncode == 0
