"""Logging never blocks: if stderr accepts nothing, lines are dropped and counted."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from gateway_process import NULL, STOP_S, ServedProcess, _becomes_ready

from sagellm.logs.lines import LogWriter

NUM_REQUESTS = 60


@contextmanager
def stderr_at(descriptor: int) -> Iterator[None]:
    """Descriptor 2 is this descriptor during the block."""
    before, stderr = os.dup(2), sys.stderr
    os.dup2(descriptor, 2)
    sys.stderr = sys.__stderr__ = os.fdopen(os.dup(2), "w")
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = sys.__stderr__ = stderr
        os.dup2(before, 2)
        os.close(before)


def test_lines_come_in_order_and_whole() -> None:
    reader, sink = os.pipe()
    with stderr_at(sink):
        writer = LogWriter()
        for number in range(200):
            writer.write(f"line {number}\n")
        writer.close()
    os.close(sink)
    with os.fdopen(reader) as found:
        assert found.read().splitlines() == [f"line {number}" for number in range(200)]
    assert writer.num_dropped == 0


def test_nobody_waits_for_a_reader_that_does_not_read() -> None:
    reader, sink = os.pipe()
    with stderr_at(sink):
        writer = LogWriter()
        began_s = time.perf_counter()
        for _ in range(400):
            writer.write("x" * 10_000 + "\n")
        writer.close()
        assert time.perf_counter() - began_s < 3
        assert 200 < writer.num_dropped < 400
        os.close(reader)
        writer._thread.join(10)  # queued lines cannot be written any more


def test_a_line_says_how_many_were_dropped() -> None:
    reader, sink = os.pipe()
    with stderr_at(sink), os.fdopen(reader) as found:
        writer = LogWriter()
        for _ in range(400):
            writer.write("x" * 10_000 + "\n")
        while '"logs_dropped"' not in (line := found.readline()):
            pass
        assert str(writer.num_dropped) in line
        writer.close()
    os.close(sink)


def test_a_full_disk_is_counted() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with stderr_at(full):
        writer = LogWriter()
        writer.write("x\n")
        writer.close()
    os.close(full)
    assert writer.num_dropped == 1


@pytest.mark.parametrize(
    "sink", ["a pipe that nobody reads", pytest.param("a full disk", marks=pytest.mark.soak)]
)
def test_serving_goes_on_without_logs(sink: str) -> None:
    if sink == "a full disk":
        descriptors = [os.open("/dev/full", os.O_WRONLY)]
    else:
        descriptors = list(os.pipe())
        fcntl.fcntl(descriptors[-1], fcntl.F_SETPIPE_SZ, 4096)
    command = [sys.executable, "-m", "sagellm", "serve", str(NULL), "--port", "0"]
    command += ["--log-level", "debug"]
    with subprocess.Popen(command, stderr=descriptors[-1]) as process:
        served = ServedProcess(0, psutil.Process(process.pid), {})
        assert _becomes_ready(served, process)
        for _ in range(NUM_REQUESTS):
            served.complete()
        num_dropped = served.metrics()["sagellm_log_lines_dropped_total"]
        process.terminate()
        assert process.wait(STOP_S) == 0
    for descriptor in descriptors:
        os.close(descriptor)
    assert (num_dropped > 0) == (sink == "a full disk")


def test_what_is_not_a_descriptor_is_written_to(capsys: pytest.CaptureFixture[str]) -> None:
    writer = LogWriter()
    writer.write("heard\n")
    writer.close()
    assert "heard" in capsys.readouterr().err
    assert subprocess.run([sys.executable, "-c", "import sagellm.logs.lines"], check=True)
