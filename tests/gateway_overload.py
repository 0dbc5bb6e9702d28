"""Load on a served process of known capacity: what was good of it, and what was refused how.

The capacity is small, so that ten times of it leaves room on two cores for the server, which takes
some 2 ms to refuse a call and 10 ms to show /metrics, and for the client, which takes 2 ms a call.
"""

import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx2
import trio
from gateway_process import ServedProcess, read_metrics
from gateway_session import frozen_heap

from sagellm.client.server import AsyncServerConnection
from sagellm.load import REFUSALS, LoadDriver, LoadTarget, RequestRecord, Sender
from sagellm.load.report import Objective, Summary, percentile, summarise
from sagellm.load.workload import Prompts, closed_loop, poisson, within

MEAN_TOKENS = 32
STEP_S = 0.02
NUM_INFLIGHT = 4
CAPACITY = NUM_INFLIGHT / (MEAN_TOKENS * STEP_S)  # requests a second: 6.25
OBJECTIVE_S = 1.0
MAX_QUEUED = 16
REFUSED_S = 0.05
SAMPLE_S = 0.1
LATE_S = 0.05  # of a client that waits for nobody: its machine is too busy to measure on
COSTS = {
    "g.device": "null",
    "g.decode_step_s": STEP_S,
    "g.prefill_token_s": 1e-5,
    "g.max_model_len": 512,
    "generate.max_inflight": NUM_INFLIGHT,
    "admission.max_queued": MAX_QUEUED,
    "admission.slo_ttft_s": OBJECTIVE_S,
}


def options_of(costs: dict[str, Any]) -> Iterator[str]:
    for name, value in costs.items():
        yield from ("--set", f"{name}={value}")


@dataclass
class Watched(httpx2.AsyncBaseTransport):
    """Keeps the Retry-After of every refusal, as it was written."""

    retry_after: list[str] = field(default_factory=list)
    wire: httpx2.AsyncBaseTransport = field(
        default_factory=lambda: httpx2.AsyncHTTPTransport(
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        )
    )

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await self.wire.handle_async_request(request)
        if response.status_code in REFUSALS:
            self.retry_after.append(response.headers.get("retry-after", ""))
        return response

    async def aclose(self) -> None:
        await self.wire.aclose()


@dataclass
class Overload:
    """One spell of Poisson arrivals at one rate."""

    rate: float
    seconds: float
    records: list[RequestRecord] = field(default_factory=list)
    retry_after: list[str] = field(default_factory=list)
    depths: list[float] = field(default_factory=list)  # of the queue, every 100 ms
    cpu_s: float = 0.0
    num_open_peak: int = 0

    @property
    def summary(self) -> Summary:
        return summarise(
            self.records,
            cpu_s=self.cpu_s,
            num_open_peak=self.num_open_peak,
            objective=Objective(ttft_s=OBJECTIVE_S),
            is_open_loop=True,
        )

    @property
    def late_s(self) -> float:
        """How late, at p99, this client sent what it need not wait for: what the machine costs."""
        spread = self.summary.lag_s
        return spread.p99 if spread is not None else 0.0

    @property
    def goodput(self) -> float:
        """Tokens a second of what met the objective."""
        good = Objective(ttft_s=OBJECTIVE_S)
        return sum(one.num_tokens for one in self.records if good.holds(one)) / self.elapsed_s

    @property
    def elapsed_s(self) -> float:
        return max(one.ended_s for one in self.records)

    @property
    def ttft_p50_s(self) -> float:
        return self._ttft_s(0.5)

    @property
    def ttft_p99_s(self) -> float:
        return self._ttft_s(0.99)

    def _ttft_s(self, share: float) -> float:
        """Of what was let in."""
        found = sorted(one.ttft_s for one in self.records if one.ttft_s is not None)
        return percentile(found, share)

    def refused_s(self, share: float) -> float:
        """How long refusals took."""
        refused = [one.e2e_s for one in self.records if one.status in REFUSALS]
        return percentile(sorted(refused), share) if refused else 0.0

    @property
    def says(self) -> str:
        summary = self.summary
        return (
            f"{self.rate:.0f}/s: {summary.num_sent} sent, {summary.num_ok} served, "
            f"{summary.errors}; goodput {self.goodput:.0f} tokens/s; TTFT p99 "
            f"{self.ttft_p99_s:.3f} s; refusal p99 {1e3 * self.refused_s(0.99):.1f} ms; deepest "
            f"queue {max(self.depths)}; client {summary.client.cpu_ratio:.0%} of a core, sent "
            f"{1e3 * self.late_s:.1f} ms late at p99"
        )


async def overloaded(
    served: ServedProcess, rate: float, seconds: float, *, seed: int = 0
) -> Overload:
    """Arrivals for so long; returns once all have ended."""
    load, transport = Overload(rate, seconds), Watched()
    server = AsyncServerConnection(served.url, None, 60.0, transport)
    lengths = closed_loop(64, MEAN_TOKENS, 0.5, seed)
    arrivals = within(poisson(lengths, rate, seed), seconds)
    async with aclosing(server), trio.open_nursery() as nursery:
        nursery.start_soon(_sample, served, load)
        target = LoadTarget(model="sage-tiny", options={"ignore_eos": True, "temperature": 0})
        sender = Sender(server, target, Prompts("ids", seed=seed))
        drive = LoadDriver(sender.send, lambda: sender.now_s)
        began_s = time.process_time()
        with frozen_heap():  # a client that walks all that pytest has loaded measures itself
            await drive.open(arrivals)
        load.cpu_s = time.process_time() - began_s
        nursery.cancel_scope.cancel()
    load.records, load.num_open_peak = drive.records, drive.num_open_peak
    load.retry_after = transport.retry_after
    return load


async def _sample(served: ServedProcess, load: Overload) -> None:
    async with httpx2.AsyncClient(base_url=served.url) as client:
        while True:
            due_s = trio.current_time() + SAMPLE_S
            read = read_metrics((await client.get("/metrics")).text)
            load.depths.append(queue_depth(read))
            await trio.sleep_until(due_s)


def queue_depth(metrics: dict[str, float]) -> float:
    """What waits in policy_sort."""
    name = "sagellm_operator_queue_depth{"
    return sum(metrics[key] for key in metrics if key.startswith(name) and "policy_sort" in key)


async def peak_goodput(served: ServedProcess, seconds: float, parts: tuple[float, ...]) -> float:
    """Of a sweep over rates around what can be served."""
    peaks = []
    for part in parts:
        load = await overloaded(served, part * CAPACITY, seconds, seed=int(100 * part))
        print(load.says)
        peaks.append(load.goodput)
    return max(peaks)


def check_overload(load: Overload, peak: float) -> None:
    """The promises at ten times what can be served; how fast refusals are is the caller's."""
    assert load.summary.sent_per_s >= 0.9 * load.rate
    assert set(load.summary.errors) == {"http_503"}
    assert len(load.depths) >= 0.9 * load.seconds / SAMPLE_S
    assert max(load.depths) <= MAX_QUEUED
    assert load.goodput >= 0.9 * peak
    assert load.ttft_p99_s <= 1.5 * OBJECTIVE_S
    assert len(load.retry_after) == load.summary.num_failed
    assert all(text.isdecimal() and int(text) >= 1 for text in load.retry_after)
