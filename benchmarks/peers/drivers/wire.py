"""How a driver talks: a line of JSON asked on stdin, a line answered on stdout; stdlib only.

    {"do": "load", "folder": ..., "threads": 2, ...}       -> {"loaded": true}
    {"do": "run", "prompts": [[...]], "num_out": 128, ...} -> {"times": [[0.1, ...], ...]}
    {"do": "score", "prompt": [...]}                       -> {"logprobs": [...]}

Whatever fails is answered with {"error": "..."}; the driver lives on. Libraries print what they
like: it goes to stderr.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Load:
    """A model to load, for requests of at most `max_len` tokens, `max_seqs` at once.

    `max_tokens`: those of all of them together, which is what the KV cache must hold.
    """

    path: str
    row: str
    threads: int
    max_len: int
    max_seqs: int
    max_tokens: int


@dataclass(frozen=True)
class Ask:
    """Prompts of equal length, all at once; greedy, `num_out` tokens each, no end before.

    `together`: go on until `num_out` tokens of the last one to begin are there, the others having
    been kept busy. `cap_s`: stop this many seconds after the first token; 0 for never.
    """

    prompts: list[list[int]]
    num_out: int
    together: bool = False
    cap_s: float = 0.0


class Driver(Protocol):
    """One engine. Each may raise anything; that is answered as an error."""

    def load(self, asked: Load) -> None: ...

    def run(self, asked: Ask) -> list[list[float]]:
        """When each token of each sequence was there, in seconds since the start."""
        ...

    def score(self, prompt: list[int]) -> list[float]:
        """The logarithms of the probabilities of the prompt's tokens but the first."""
        ...


class Clock:
    """Times of tokens while a run goes on, and whether it has gone on for too long."""

    def __init__(self, asked: Ask) -> None:
        self.times: list[list[float]] = [[] for _ in asked.prompts]
        self._cap_s = asked.cap_s
        self._started = time.perf_counter()

    def note(self, sequence: int, num_tokens: int = 1) -> None:
        """New tokens of one sequence."""
        self.times[sequence] += [time.perf_counter() - self._started] * num_tokens

    def note_all(self) -> None:
        """One more token of every sequence."""
        now = time.perf_counter() - self._started
        for times in self.times:
            times.append(now)

    @property
    def is_late(self) -> bool:
        first = min((times[0] for times in self.times if times), default=None)
        enough = all(len(times) > 2 for times in self.times)
        now = time.perf_counter() - self._started
        return bool(self._cap_s and enough and first is not None and now - first > self._cap_s)


def warm_up(driver: Driver) -> None:
    """What a first request pays for: before each run, for engines take turns in the caches."""
    driver.run(Ask([[1] * 16], 2))


PR_SET_PDEATHSIG = 1  # of prctl(2)


def serve(driver: Driver) -> None:
    """Answer until stdin ends, or whoever asks has died: a stopped process would not see that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = _answer(driver, json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(driver: Driver, asked: dict[str, Any]) -> dict[str, Any]:
    kind = asked.pop("do")
    if kind == "load":
        driver.load(Load(**asked))
        gc.collect()
        gc.freeze()
        return {"loaded": True}
    if kind == "score":
        return {"logprobs": driver.score(asked["prompt"])}
    cold = asked.pop("cold", False)
    if not cold:
        warm_up(driver)
    return {"times": driver.run(Ask(**asked))}
