"""The protocol of drivers: a request as a JSON line on stdin, its answer on stdout; stdlib only.

    {"do": "load", "folder": ..., "threads": 2, ...}       -> {"loaded": true}
    {"do": "run", "prompts": [[...]], "num_out": 128, ...} -> {"times": [[0.1, ...], ...]}
    {"do": "score", "prompt": [...]}                       -> {"logprobs": [...]}

An error is answered as {"error": "..."}, and the driver goes on. What libraries print to stdout
goes to stderr.
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

    `max_tokens`: the tokens of all requests together, which the KV cache must hold. `tokenizer`:
    load the folder's tokenizer, which grammars need.
    """

    path: str
    row: str
    threads: int
    max_len: int
    max_seqs: int
    max_tokens: int
    tokenizer: bool = False


@dataclass(frozen=True)
class Ask:
    """Prompts of equal length, all at once; greedy, exactly `num_out` tokens each.

    `together`: run until the sequence that starts last has `num_out` tokens; the others go on
    decoding meanwhile. `cap_s`: stop this many seconds after the first token; 0 for never.
    `schema`: the text of a JSON schema that binds all answers; only vLLM's driver takes it.
    """

    prompts: list[list[int]]
    num_out: int
    together: bool = False
    cap_s: float = 0.0
    schema: str | None = None


class Driver(Protocol):
    """One engine. A method may raise anything: the error is the answer."""

    def load(self, request: Load) -> None: ...

    def run(self, request: Ask) -> list[list[float]]:
        """For each sequence, the time of each token in seconds after the start."""
        ...

    def score(self, prompt: list[int]) -> list[float]:
        """The log probabilities of the prompt's tokens after the first."""
        ...


class Clock:
    """Records the times of tokens in a run, and whether the run takes too long."""

    def __init__(self, request: Ask) -> None:
        self.times: list[list[float]] = [[] for _ in request.prompts]
        self._cap_s = request.cap_s
        self._first_s: float | None = None
        self._started = time.perf_counter()

    def note(self, sequence: int, num_tokens: int = 1) -> None:
        """Record new tokens of one sequence."""
        now = time.perf_counter() - self._started
        self.times[sequence] += [now] * num_tokens
        if self._first_s is None and num_tokens:
            self._first_s = now

    def note_all(self) -> None:
        """Record one more token of every sequence."""
        now = time.perf_counter() - self._started
        if self._first_s is None:
            self._first_s = now
        for times in self.times:
            times.append(now)

    @property
    def is_late(self) -> bool:
        # Some engines ask after each token: look at all sequences only when the time is over.
        if not self._cap_s or self._first_s is None:
            return False
        now = time.perf_counter() - self._started
        return now - self._first_s > self._cap_s and all(len(times) > 2 for times in self.times)


def warm_up(driver: Driver) -> None:
    """Run a short request before each measurement: other engines used the caches in between."""
    driver.run(Ask([[1] * 16], 2))


PR_SET_PDEATHSIG = 1  # of prctl(2)


def serve(driver: Driver) -> None:
    """Answer requests until stdin ends.

    The process dies with its parent: while stopped, it would not notice the end of stdin.
    """
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


def _answer(driver: Driver, request: dict[str, Any]) -> dict[str, Any]:
    kind = request.pop("do")
    if kind == "load":
        driver.load(Load(**request))
        gc.collect()
        gc.freeze()
        return {"loaded": True}
    if kind == "score":
        return {"logprobs": driver.score(request["prompt"])}
    cold = request.pop("cold", False)
    if not cold:
        warm_up(driver)
    return {"times": driver.run(Ask(**request))}
