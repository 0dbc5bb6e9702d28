"""Child processes: their start, their end together with the parent, and pauses before restarts."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import trio


class ChildProcess:
    """Runs `module` in a Python process, with a pipe as its standard input.

    When this process ends, for any reason, the pipe closes, and the child ends, too: the child must
    call `end_with_parent`. The end of the child makes its pidfd readable, so the end is noticed
    within milliseconds. The child inherits the descriptors `files` under the same numbers.
    """

    def __init__(self, module: str, env: Mapping[str, str], files: Sequence[int] = ()) -> None:
        """Raises OSError."""
        self._popen = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=sys.stderr.fileno() if _has_descriptor() else None,
            env={**os.environ, **env},
            pass_fds=files,
            start_new_session=True,  # a Ctrl-C at the terminal is for this process alone
        )
        self._end = os.pidfd_open(self._popen.pid)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def cpu_s(self) -> float:
        """CPU time of the process so far, user and system; 0 after its end."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system

    async def wait(self) -> int:
        """Wait for the end. Returns the exit code, negative for a signal."""
        while self._popen.poll() is None:
            await trio.lowlevel.wait_readable(self._end)
        await trio.lowlevel.checkpoint()
        return self._popen.returncode

    @property
    def has_ended(self) -> bool:
        return self._popen.poll() is not None

    def tell(self, line: bytes) -> None:
        """Write a line to the child's standard input, such as the start of a spare. Raises
        OSError.
        """
        assert self._popen.stdin is not None
        self._popen.stdin.write(line)
        self._popen.stdin.flush()

    def kill(self) -> None:
        """Kill the process, even if it is stopped. Safe to call after its end."""
        if self._popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._end, signal.SIGKILL)

    def close(self) -> None:
        """Close the descriptors of a process that has ended."""
        if self._popen.stdin is not None:
            self._popen.stdin.close()
        os.close(self._end)


def _has_descriptor() -> bool:
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True


_PR_SET_PDEATHSIG = 1


def end_with_parent(folder: Path | None = None) -> None:
    """End this process as soon as its parent ends, even if the parent is killed. Call this in the
    child.

    The parent holds the other end of standard input. A thread waits until it closes, because an
    event loop may be busy or stuck. `folder`: a folder of sockets, which the thread then removes in
    place of the killed parent. Without a folder the kernel kills this process as well
    (PR_SET_PDEATHSIG), even if this process is stopped.
    """
    if folder is None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch(descriptor: int) -> None:
        while os.read(descriptor, 1):
            pass
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    descriptor = os.dup(sys.stdin.fileno())
    threading.Thread(target=watch, args=(descriptor,), name="lifeline", daemon=True).start()


# The cause of a death, as far as is known. "request": a request that was in two workers when they
# died. "link": the link to the process failed. "machine": anything else.
Blame: TypeAlias = Literal["machine", "request", "link"]
BLAMES: tuple[Blame, ...] = get_args(Blame)


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The pauses before a dead process is restarted. There is no limit to the number of restarts.

    The first pause is `first_s`; each further pause is twice the previous pause, `longest_s` at
    most. `jitter`: the share by which pauses vary at random. After more than `most` deaths within
    `within_s` the process counts as failing; it is still restarted.

    If its link fails `most_cuts` times in a row, and other processes can do its work, the process
    is ejected: the pause is then `ejected_s`. The next ejection lasts twice as long, the one after
    it three times as long, and so on, `longest_ejected_s` at most. After a life of `healthy_s` all
    counts start over.
    """

    first_s: float = 0.5
    longest_s: float = 30.0
    jitter: float = 0.2
    most: int = 5
    within_s: float = 60.0
    healthy_s: float = 60.0
    most_cuts: int = 5
    ejected_s: float = 10.0
    longest_ejected_s: float = 300.0


@dataclass(slots=True)
class Restarts:
    """Counts the deaths of one process, and computes the pause before its next start. All times are
    on one clock, in seconds.
    """

    policy: RestartPolicy = field(default_factory=RestartPolicy)
    count: int = 0  # restarts since the graph was opened
    is_ejected: bool = False  # the current pause is an ejection
    is_failing: bool = False  # the process died more than `most` times within `within_s`
    deaths: Counter[Blame] = field(default_factory=Counter)  # by cause
    _num_in_row: int = 0  # deaths without a healthy life in between, except those by requests
    _num_cuts: int = 0  # failures of the link in a row
    _num_ejections: int = 0  # ejections without a healthy life in between
    _recent_s: deque[float] = field(default_factory=deque)

    def died(
        self, now: float, *, ready_s: float | None, draw: float, blame: Blame = "machine"
    ) -> float:
        """Record a death. Returns the pause before the next start, in seconds.

        A death that a request caused does not lengthen the pauses. `ready_s`: when this life became
        ready; None: it never was. `draw`: a random number, uniform in [0, 1).
        """
        self._end_life(now, ready_s)
        self._num_cuts = 0
        self.deaths[blame] += 1
        if blame == "request":
            self.count += 1
            return self._jittered(self.policy.first_s, draw)
        self._recent_s.append(now)
        while self._recent_s[0] < now - self.policy.within_s:
            self._recent_s.popleft()
        # A failing process has long pauses, and so fewer deaths within `within_s`. It must still
        # count as failing until a healthy life resets it.
        self.is_failing = self.is_failing or len(self._recent_s) > self.policy.most
        return self._next_delay_s(draw)

    def cut(self, now: float, *, ready_s: float | None, draw: float, may_eject: bool) -> float:
        """Record that the link to the process failed. Returns the pause before the next start, in
        seconds. `may_eject`: other processes can do the work. See `died`.
        """
        self._end_life(now, ready_s)
        self.deaths["link"] += 1
        self._num_cuts += 1
        self.is_ejected = may_eject and self._num_cuts >= self.policy.most_cuts
        if not self.is_ejected:
            return self._next_delay_s(draw)
        self._num_ejections += 1
        self.count += 1
        return min(self.policy.ejected_s * self._num_ejections, self.policy.longest_ejected_s)

    def reset_backoff(self) -> None:
        """Forget earlier deaths, so that the next pause is the shortest."""
        self.is_failing = False
        self._num_in_row = self._num_cuts = self._num_ejections = 0
        self._recent_s.clear()

    def note_uptime(self, seconds: float) -> None:
        """Record that the current life has been ready for `seconds`; after `healthy_s` of them,
        forget earlier deaths.
        """
        if seconds >= self.policy.healthy_s:
            self.reset_backoff()

    def _end_life(self, now: float, ready_s: float | None) -> None:
        self.is_ejected = False
        if ready_s is not None:
            self.note_uptime(now - ready_s)

    def _next_delay_s(self, draw: float) -> float:
        policy = self.policy
        doubled = 2.0 ** min(self._num_in_row, 1000)  # a float ends at 2**1024
        delay_s = min(policy.first_s * doubled, policy.longest_s)
        self._num_in_row += 1
        self.count += 1
        return self._jittered(delay_s, draw)

    def _jittered(self, delay_s: float, draw: float) -> float:
        return delay_s * (1 + self.policy.jitter * (2 * draw - 1))
