"""Minutes of clients that connect, stream, disconnect and send mistakes: no resource leaks."""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import linear_regression, median

import pytest
import trio
from gateway_process import ServedProcess, served_process
from gateway_served import get, post

CHURN_S = float(os.environ.get("SAGELLM_CHURN_S", "300"))
WARM_UP_S, WARM_UP_CALLS = CHURN_S / 3, 25_000  # the heap has its final size after these
SAMPLE_S = 1.0
NUM_CLIENTS = 8
NUM_WORKERS = 4  # worker threads start and end on demand
GROWN_BYTES_PER_MIN = 200_000  # a minute has some 10,000 calls
OPTIONS = ("--set", "g.decode_step_s=0.002", "--max-model-len", "512")

pytestmark = pytest.mark.timeout(CHURN_S + 600)


@dataclass
class Samples:
    """Memory, files and threads of one process, a sample each second."""

    at_s: list[float] = field(default_factory=list)
    rss_bytes: list[float] = field(default_factory=list)
    num_fds: list[int] = field(default_factory=list)
    num_threads: list[int] = field(default_factory=list)

    async def take(self, served: ServedProcess) -> None:
        while True:
            self.at_s.append(trio.current_time())
            self.rss_bytes.append(served.rss_bytes)
            self.num_fds.append(served.process.num_fds())
            self.num_threads.append(served.process.num_threads())
            await trio.sleep(SAMPLE_S)

    @property
    def grown_bytes_per_min(self) -> float:
        """The slope of a line fitted to the memory in use."""
        return 60 * linear_regression(self.at_s, self.rss_bytes).slope

    @property
    def grown_fds(self) -> float:
        """The growth of open files between the first and the second half."""
        half = len(self.num_fds) // 2
        return median(self.num_fds[half:]) - median(self.num_fds[:half])


@pytest.fixture(params=["hypercorn", "uvicorn"])
def served(request: pytest.FixtureRequest) -> Iterator[ServedProcess]:
    with served_process(*OPTIONS, "--server", request.param) as found:
        yield found


async def test_nothing_grows(served: ServedProcess) -> None:
    counts = [0]
    await churn(served, WARM_UP_S, counts)
    while counts[0] < WARM_UP_CALLS:  # on a slow machine
        await churn(served, 10.0, counts)
    num_fds = settled_files(served)
    samples = Samples()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(samples.take, served)
        await churn(served, CHURN_S - WARM_UP_S, counts)
        nursery.cancel_scope.cancel()
    print(
        f"{counts[0]} calls; memory {samples.rss_bytes[0] / 2**20:.1f} -> "
        f"{samples.rss_bytes[-1] / 2**20:.1f} MiB, {samples.grown_bytes_per_min / 2**10:.0f} KiB a "
        f"minute; files {num_fds} -> {settled_files(served)}; threads {set(samples.num_threads)}"
    )
    metrics = served.metrics()
    assert metrics["sagellm_requests_open"] == 0
    num_available = sum(metrics[f"sagellm_engine_kv_{kind}_blocks"] for kind in ("free", "cached"))
    assert num_available == metrics["sagellm_engine_kv_blocks"]
    assert samples.grown_bytes_per_min <= GROWN_BYTES_PER_MIN
    assert samples.grown_fds <= 2
    # In one turn of its loop the server accepts the connections that clients have closed already.
    assert max(samples.num_fds) <= num_fds + 4 * NUM_CLIENTS
    assert settled_files(served) == num_fds
    assert max(samples.num_threads) - min(samples.num_threads) <= NUM_WORKERS


async def churn(served: ServedProcess, seconds: float, counts: list[int]) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(NUM_CLIENTS):
            draw = random.Random(f"{number}/{seconds}")
            nursery.start_soon(one_after_another, served, draw, seconds, counts)


async def one_after_another(
    served: ServedProcess, draw: random.Random, seconds: float, counts: list[int]
) -> None:
    until_s = trio.current_time() + seconds
    while trio.current_time() < until_s:
        stream = await trio.open_tcp_stream("127.0.0.1", served.port)
        async with stream:
            await stream.send_all(call(draw))
            with trio.move_on_after(draw.choice((0.0, 0.01, 0.1, 10.0))):
                while await stream.receive_some():
                    pass
        counts[0] += 1


def call(draw: random.Random) -> bytes:
    """One call: a stream, a whole answer, a mistake, or a question about the server."""
    kind = draw.random()
    if kind < 0.1:
        return get(draw.choice(("/metrics", "/v1/models", "/nowhere")), "Connection: close")
    body = {
        "prompt": [draw.randrange(256) for _ in range(draw.randint(1, 100))],
        "max_tokens": draw.randint(1, 60) if kind < 0.9 else 0,
        "stream": draw.random() < 0.7,
        "n": draw.choice((1, 1, 3)),
        "user": f"u{draw.randrange(10**9)}",
    }
    return post("/v1/completions", body, "Connection: close")


def settled_files(served: ServedProcess) -> int:
    """The number of open files once connections have ended."""
    for _ in range(100):
        served.complete()  # one call and its answer give other connections time to end
        if not served.num_sockets:
            break
    return served.process.num_fds()
