"""The engines of one model and row: alive together, run in turns, failures recorded."""

import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.cells import Cell
from benchmarks.peers.engines import Peer
from benchmarks.peers.environments import NotInstalled
from benchmarks.peers.living import LivingPeer, PeerError
from benchmarks.peers.plan import ERROR, Subject
from benchmarks.peers.timing import Figure, figure

LOAD_S = 900.0
RUN_S = 3600.0
GB = 1e9


class Group:
    """A context manager. `failed`: engines without further figures, and the reason of each."""

    def __init__(self, peers: Iterable[Peer], subject: Subject, row: str, threads: int) -> None:
        self.row = row
        self.subject = subject
        self.failed: dict[str, str] = {}
        self.idle_shares: dict[str, float] = {}
        self._peers = {peer.name: peer for peer in peers}
        self._threads = threads
        self._living: dict[str, LivingPeer] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="sagellm-peers-")

    def __enter__(self) -> "Group":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for living in self._living.values():
            living.close()
        self._folder.cleanup()

    @property
    def names(self) -> list[str]:
        """The engines that have not failed."""
        return [name for name in self._peers if name not in self.failed]

    def prepare(self) -> None:
        """Make environments and model files. Their time belongs to no figure."""
        for name in self.names:
            peer = self._peers[name]
            if self.row not in peer.rows:
                self.failed[name] = f"has no row {self.row}"
                continue
            with self.noting(name):
                peer.command()
                peer.model(self.subject.shape, self.row)

    def start(self, name: str) -> Figure:
        """Start an engine, in place of its old process. Returns seconds until its first token."""
        peer, subject = self._peers[name], self.subject
        if name in self._living:
            self._living.pop(name).close()
        log = Path(self._folder.name) / f"{name}.log"
        living = LivingPeer(peer.command(), peer.variables(self._threads), log)
        self._living[name] = living
        living.ask(
            "load",
            timeout_s=LOAD_S,
            path=str(peer.model(subject.shape, self.row)),
            row=self.row,
            threads=self._threads,
            max_len=subject.max_len,
            max_seqs=subject.max_seqs,
            max_tokens=subject.max_tokens,
        )
        living.ask("run", timeout_s=LOAD_S, cold=True, prompts=[[1] * 128], num_out=1)
        taken_s = time.perf_counter() - living.started_s
        self.idle_shares[name] = round(living.idle_share(), 2)
        return Figure(taken_s)

    def run(self, name: str, cell: Cell, number: int, cap_s: float) -> Figure:
        """Run one round of a cell. Raises PeerError, and ValueError for unusable times."""
        answer = self._living[name].ask(
            "run",
            timeout_s=RUN_S,
            prompts=cell.prompts(number, self.subject.shape.vocab_size),
            num_out=cell.num_out,
            together=cell.kind == "decode" and cell.num_sequences > 1,
            cap_s=cap_s,
        )
        return figure(cell, answer["times"])

    def memory(self, name: str) -> Figure:
        return Figure(self._living[name].peak_bytes() / GB)

    def logprobs(self, name: str) -> list[float]:
        """Log probabilities of the tokens of one prompt after the first."""
        (prompt,) = ERROR.prompts(0, self.subject.shape.vocab_size)
        answer = self._living[name].ask("score", timeout_s=RUN_S, prompt=prompt)
        return [float(logprob) for logprob in answer["logprobs"]]

    def noting(self, name: str) -> "_Noting":
        """A block whose known errors are recorded for the engine `name`, and end the engine."""
        return _Noting(name, self._fail)

    def _fail(self, name: str, why: str) -> None:
        print(f"{self.subject.shape.name} {self.row} {name}: {why}", file=sys.stderr)
        self.failed[name] = why
        if name in self._living:
            self._living.pop(name).close()


class _Noting:
    """The block of `Group.noting`."""

    def __init__(self, name: str, fail: Callable[[str, str], None]) -> None:
        self._name = name
        self._fail = fail

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> bool:
        if isinstance(error, NotInstalled | PeerError | ValueError | OSError):
            self._fail(self._name, str(error))
            return True
        return False
