"""A child process: how it starts, ends with its parent, and when it is started again."""

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
    """A Python process that runs `module`, with a pipe as its standard input.

    The pipe closes when this process ends, in any way, and the child ends with it: the child calls
    `end_with_parent`. The end of the child makes a descriptor readable (pidfd), so that it is
    noticed within milliseconds. The child inherits the descriptors `files` under their numbers.
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
        """Write a line to its standard input, such as the start of a spare. Raises OSError."""
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
    """End this process when its parent ends, even by a kill. Call this in the child.

    The parent keeps standard input open; a thread waits for its end. A thread does so because an
    event loop may be busy, or stuck. `folder`: sockets that are removed then, as the parent cannot.
    Without a folder the kernel kills this process, too (PR_SET_PDEATHSIG): that works even if the
    process is stopped.
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


# The cause of a death, as far as can be known: a request that was in two workers when they died,
# the link to the process, or anything else.
Blame: TypeAlias = Literal["machine", "request", "link"]
BLAMES: tuple[Blame, ...] = get_args(Blame)


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a process that died is started again: for ever, after pauses that grow up to a limit.

    The first restart comes after `first_s`, each next restart after twice the pause, `longest_s` at
    most. `jitter`: the share by which pauses vary at random. After more than `most` deaths within
    `within_s` the process counts as failing; it is still restarted.

    A process whose link fails `most_cuts` times in a row is ejected for `ejected_s`, if others can
    do its work. The next ejection lasts twice as long, then three times, `longest_ejected_s` at
    most. A life of `healthy_s` resets all of this.
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
    """The deaths of one process, and its next pause. Times are of one clock, in seconds."""

    policy: RestartPolicy = field(default_factory=RestartPolicy)
    count: int = 0  # restarts since the graph was opened
    is_ejected: bool = False  # since its link failed last
    is_failing: bool = False  # it died more than `most` times within `within_s`
    deaths: Counter[Blame] = field(default_factory=Counter)  # by blame
    _num_in_row: int = 0
    _num_cuts: int = 0  # in a row
    _num_ejections: int = 0  # in a row
    _recent_s: deque[float] = field(default_factory=deque)

    def died(
        self, now: float, *, ready_s: float | None, draw: float, blame: Blame = "machine"
    ) -> float:
        """Record a death. Returns the pause before the next start.

        A death that a request caused makes no pause longer. `ready_s`: when this life became ready,
        if it did. `draw`: uniform in [0, 1).
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
        # A failing process dies less often, as its pauses are long: only a healthy life resets it.
        self.is_failing = self.is_failing or len(self._recent_s) > self.policy.most
        return self._next_delay_s(draw)

    def cut(self, now: float, *, ready_s: float | None, draw: float, may_eject: bool) -> float:
        """Record that the link failed. Returns the pause before the next start; see `died`."""
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
        """Forget earlier deaths: they make no pause longer."""
        self.is_failing = False
        self._num_in_row = self._num_cuts = self._num_ejections = 0
        self._recent_s.clear()

    def note_uptime(self, seconds: float) -> None:
        """Record how long the current life has been ready."""
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
