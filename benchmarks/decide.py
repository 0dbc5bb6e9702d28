"""The cost of a decision: `sagellm bench decide`.

A core runs admission, policy_sort, pd_split and route of a graph with simulated engines. Every
replica is full: when a request ends, a waiting request takes its place, and a new request arrives.
Only the CPU time of the core is measured: per request from its arrival to its end, and per token in
batches of one engine step.
"""

import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from statistics import median
from typing import Any

from cyclopts import App

from benchmarks.machine import describe
from sagellm import Graph
from sagellm.extensions import RESOLVER
from sagellm.opening.sources import override
from sagellm.runtime.core.core import Core
from sagellm.runtime.core.effects import Send
from sagellm.runtime.core.events import Arrived, Emitted, Event, Opened, Released, Reported
from sagellm.runtime.feedback import LoadReported
from sagellm.runtime.messages import Request, Stamps, TokenEvent
from sagellm.runtime.operator import Credit
from sagellm.runtime.plan import plan
from sagellm.runtime.port import EngineLoad
from sagellm.runtime.sampling import Sampling

WAITING = (10, 1_000, 100_000)
REPLICAS = (8, 64, 1_000)
BATCH = 32
STEP_S = 0.02
NO_SHADOWS: Mapping[str, Any] = {}
SHADOWS = {
    "admission.shadow": {"max_queued": 10_000_000},
    "sort.shadow": {"policy": "weighted_shortest_prefill"},
    "split.shadow": {"min_uncached_tokens": 800},
    "route.shadow": {"strategy": "power_of_two"},
    "route_aggregated.shadow": {"strategy": "power_of_two"},
}
APP = App(name="sagellm bench decide", help=__doc__)


@dataclass(frozen=True, slots=True)
class Cell:
    """Microseconds of CPU for a number of waiting requests and of replicas of each engine."""

    waiting: int
    replicas: int
    us_per_request_p50: float
    us_per_request_p99: float
    us_per_token: float


@APP.default
def decide(
    *,
    waiting: tuple[int, ...] = WAITING,
    replicas: tuple[int, ...] = REPLICAS,
    requests: int = 400,
    shadows: bool = False,
    json: bool = False,
    output: Path | None = None,
) -> None:
    """Measure every pair of these.

    Parameters
    ----------
    waiting
        Requests that wait in policy_sort; may be repeated.
    replicas
        Replicas of each engine; may be repeated.
    requests
        That are measured in each cell.
    shadows
        Give each of the four operators a shadow with another policy.
    json
        Print the record as JSON, and nothing else.
    output
        A file for the record.
    """
    cells = []
    for num_waiting in waiting:
        for num_replicas in replicas:
            cell = measure(num_waiting, num_replicas, requests, shadows=shadows)
            cells.append(cell)
            if not json:
                print(_line(cell), flush=True)
    record = {
        "command": " ".join(["sagellm bench decide", *sys.argv[1:]]),
        "machine": describe(),
        "cells": [asdict(cell) for cell in cells],
    }
    text = dumps(record, indent=1)
    if json:
        print(text)
    if output is not None:
        output.write_text(text + "\n")


def _line(cell: Cell) -> str:
    return (
        f"{cell.waiting:>7,} waiting, {cell.replicas:>5,} replicas: "
        f"{cell.us_per_request_p50:.1f} us a request (p99 {cell.us_per_request_p99:.1f}), "
        f"{cell.us_per_token:.2f} us a token"
    )


def measure(
    num_waiting: int, num_replicas: int, num_requests: int, *, shadows: bool = False
) -> Cell:
    """Measure one cell in a steady state: a request arrives for each request that ends."""
    simulated = SimulatedEngines(num_waiting, num_replicas, SHADOWS if shadows else {})
    for _ in range(min(num_requests // 4, 100)):
        simulated.replace_request()
    costs = [simulated.replace_request() for _ in range(num_requests)]
    tokens = [simulated.step() for _ in range(num_requests // 4)]
    return Cell(
        num_waiting,
        num_replicas,
        round(median(costs) * 1e6, 1),
        round(sorted(costs)[int(len(costs) * 0.99)] * 1e6, 1),
        round(median(tokens) * 1e6, 2),
    )


class SimulatedEngines:
    """A core with simulated engines. All replicas of `generate` are full."""

    def __init__(
        self, num_waiting: int, num_replicas: int, overrides: Mapping[str, Any] = NO_SHADOWS
    ) -> None:
        graph = override(Graph.load("pd_many").ir, overrides)
        ready = plan(graph, RESOLVER, dict.fromkeys(graph.engines, num_replicas))
        self._core = Core(ready, clock=time.perf_counter)
        self._now = 0.0
        self._spent_s = 0.0
        self._numbers = iter(range(10**9))
        self._running: deque[tuple[Send, int]] = deque()  # and its number of tokens
        for node in ready.services:
            for replica in range(ready.num_replicas(node)):
                self._on(Opened(node, replica, Credit(requests=4, blocks=4096), 16))
        for _ in range(num_waiting + 4 * num_replicas):
            self._arrive()

    def replace_request(self) -> float:
        """End one request, send the next and let a new one arrive. Returns CPU seconds."""
        self._now += STEP_S
        self._spent_s = 0.0
        send, _ = self._running.popleft()
        gate = send.node, send.replica
        request = send.item
        assert isinstance(request, Request)
        last = TokenEvent(
            request_id=request.request_id,
            token_ids=(7,),
            finish_reason="length",
            stamps=request.stamps,
        )
        self._on(Emitted(1, *gate, (last,)))
        self._on(Released(*gate, *request.key))
        self._on(
            Reported(LoadReported(node=gate[0], replica=gate[1], load=EngineLoad(num_running=4)))
        )
        self._arrive()
        return self._spent_s

    def step(self) -> float:
        """Run one engine step of a batch. Returns CPU seconds a token."""
        self._now += STEP_S
        self._spent_s = 0.0
        events = []
        for _ in range(min(BATCH, len(self._running))):
            send, num_tokens = self._running.popleft()
            name = send.item.request_id
            events.append(
                TokenEvent(request_id=name, position=num_tokens, token_ids=(7,), text="a")
            )
            self._running.append((send, num_tokens + 1))
        self._on(Emitted(1, "generate", 0, tuple(events)))
        self._on(Reported(LoadReported(node="generate", load=EngineLoad(num_running=4))))
        return self._spent_s / len(events)

    def _arrive(self) -> None:
        request = Request(
            request_id=f"r{next(self._numbers)}",
            prompt_token_ids=(1,) * 24,
            sampling=Sampling(max_tokens=64),
            stamps=Stamps(arrived_s=self._now),
        )
        self._on(Arrived(1, (request,)))

    def _on(self, event: Event) -> None:
        begun_s = time.process_time()
        effects = self._core.on(event, self._now)
        self._spent_s += time.process_time() - begun_s
        self._running += ((effect, 0) for effect in effects if isinstance(effect, Send))


if __name__ == "__main__":
    APP()
