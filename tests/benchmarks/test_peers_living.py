import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from child_processes import children

from benchmarks.peers.living import LivingPeer, PeerError
from benchmarks.peers.models import DRIVERS

FAKE = Path(__file__).parent / "fake_driver.py"
LOAD = {
    "path": "", "row": "bf16", "threads": 1, "max_len": 8, "max_seqs": 1, "max_tokens": 8,
}  # fmt: skip


@contextmanager
def living(tmp_path: Path, mode: str = "") -> Iterator[LivingPeer]:
    command = [sys.executable, "-S", str(FAKE), str(DRIVERS), mode]
    with LivingPeer(command, os.environ, tmp_path / "log") as peer:
        yield peer


def test_it_answers_one_request_after_another(tmp_path: Path) -> None:
    with living(tmp_path) as peer:
        assert peer.ask("load", timeout_s=10, **LOAD) == {"loaded": True}
        answer = peer.ask("run", timeout_s=10, prompts=[[1], [2]], num_out=2)
        assert answer == {"times": [[0.001, 0.002], [0.001, 0.002]]}
        scored = peer.ask("score", timeout_s=10, prompt=[0, 1, 2])
        assert scored == {"logprobs": [-1.1, -1.2]}


def test_what_a_library_prints_is_no_answer(tmp_path: Path) -> None:
    with living(tmp_path, "noise") as peer:
        peer.ask("load", timeout_s=10, **LOAD)
        assert "times" in peer.ask("run", timeout_s=10, prompts=[[1]], num_out=1)


def test_an_error_is_told_and_the_driver_lives_on(tmp_path: Path) -> None:
    with living(tmp_path, "refuse") as peer:
        with pytest.raises(PeerError, match="ValueError: no row bf16"):
            peer.ask("load", timeout_s=10, **LOAD)
        assert "times" in peer.ask("run", timeout_s=10, prompts=[[1]], num_out=1)


def test_a_signal_that_ends_it_is_named(tmp_path: Path) -> None:
    with living(tmp_path, "die") as peer, pytest.raises(PeerError, match="SIGILL"):
        peer.ask("load", timeout_s=10, **LOAD)


def test_an_exit_tells_its_code_and_its_last_word(tmp_path: Path) -> None:
    with living(tmp_path, "exit") as peer:
        peer.ask("load", timeout_s=10, **LOAD)
        with pytest.raises(PeerError, match="code 3: out of memory"):
            peer.ask("run", timeout_s=10, prompts=[[1]], num_out=1)
        with pytest.raises(PeerError, match="code 3"):
            peer.ask("run", timeout_s=10, prompts=[[1]], num_out=1)


def test_one_that_never_answers_is_ended(tmp_path: Path) -> None:
    with living(tmp_path, "mute") as peer:
        peer.ask("load", timeout_s=10, **LOAD)
        with pytest.raises(PeerError, match="no answer in 0 s"):
            peer.ask("run", timeout_s=0.2, prompts=[[1]], num_out=1)
        with pytest.raises(PeerError, match="ended before"):
            peer.ask("run", timeout_s=10, prompts=[[1]], num_out=1)


def test_it_is_stopped_while_nothing_is_asked(tmp_path: Path) -> None:
    others = children()
    with living(tmp_path, "spin") as peer:
        peer.ask("load", timeout_s=10, **LOAD)
        (process,) = children() - others
        assert process.status() == psutil.STATUS_STOPPED
        assert peer.idle_share() > 0.05  # it spins as soon as it may, as far as others let it
        assert process.status() == psutil.STATUS_STOPPED
        assert peer.peak_bytes() > 1 << 20
    assert not process.is_running()


ORPHAN = """
import os, sys
from pathlib import Path
from benchmarks.peers.living import LivingPeer
peer = LivingPeer(sys.argv[2:], os.environ, Path(sys.argv[1]))
peer.ask("load", timeout_s=10, path="", row="", threads=1, max_len=8, max_seqs=1, max_tokens=8)
print(peer._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_stopped_driver_does_not_outlive_a_killed_measurement(tmp_path: Path) -> None:
    driver = [sys.executable, "-S", str(FAKE), str(DRIVERS)]
    command = [sys.executable, "-c", ORPHAN, str(tmp_path / "log"), *driver]
    root = str(DRIVERS.parents[2])
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == -9, done.stderr
    with suppress(psutil.NoSuchProcess):  # it is another's child now: gone, or about to be
        psutil.Process(int(done.stdout)).wait(10)
