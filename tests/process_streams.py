"""Many streams at once through a graph of worker processes, and what is done to those meanwhile."""

import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
from endings import outputs

from sagellm import Graph, Sampling
from sagellm.runtime.cluster.worker import Worker
from sagellm.session import Session

NUM_STREAMS = 12
NUM_TOKENS = 120
PROMPTS = [
    f"Story {n}: once upon a time a fox met {n} friends at the sea, and then" for n in range(99)
]
EXACT = {"deterministic": True, "max_model_len": 512}
GREEDY = Sampling(max_tokens=NUM_TOKENS, ignore_eos=True)
SEEDED = Sampling(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=1.0, seed=5)


@asynccontextmanager
async def opened(graph: str, executor: str = "processes", **options: Any) -> AsyncIterator[Session]:
    loaded = Graph.load(graph)
    engines = loaded.ir.engines
    exact = {f"{name}.{option}": value for name in engines for option, value in EXACT.items()}
    async with loaded.open(set={**exact, **options}, executor=executor) as session:
        yield session
        await session.idle()
        session.executor.core.ledger.check()
        assert num_leased(session) == 0


def num_leased(session: Session) -> int:
    """Blocks, of all engines."""
    pools = session.statistics().engines.values()
    return sum(load.num_leased_blocks for replicas in pools for load in replicas)


@dataclass
class Streams:
    """What came of many streams at once; `gaps_s`: the longest wait of each between two events."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    codes: dict[int, str] = field(default_factory=dict)
    gaps_s: dict[int, float] = field(default_factory=dict)

    async def run(self, session: Session, number: int, sampling: Sampling, prompt: Any) -> None:
        self.tokens[number] = []
        last_received_s = None
        async with session.stream(prompt, sampling=sampling) as stream:
            async for event in outputs(stream):
                now = trio.current_time()
                if last_received_s is not None:
                    self.gaps_s[number] = max(self.gaps_s.get(number, 0.0), now - last_received_s)
                last_received_s = now
                self.tokens[number] += event.token_ids
                if event.finish_reason is not None:
                    self.reasons[number], self.codes[number] = event.finish_reason, event.code


async def stream_all(
    session: Session,
    sampling: Sampling,
    meanwhile: Callable[[Streams], Any] | None = None,
    prompts: Mapping[int, Any] = dict(enumerate(PROMPTS[:NUM_STREAMS])),
) -> Streams:
    streams = Streams()
    async with trio.open_nursery() as nursery:
        for number, prompt in prompts.items():
            nursery.start_soon(streams.run, session, number, sampling, prompt)
        if meanwhile is not None:
            await meanwhile(streams)
    return streams


def worker_of(session: Session, name: str) -> Worker:
    assert session.supervisor is not None
    return next(worker for worker in session.supervisor.workers if str(worker) == name)


async def ready(session: Session, *names: str) -> None:
    """One of these workers is."""
    with trio.fail_after(30):
        while all(worker_of(session, name).state != "ready" for name in names):  # noqa: ASYNC110
            await trio.sleep(0.001)


async def killed(
    session: Session, name: str, streams: Streams, *, after: int = 10, of: Any = min
) -> None:
    """Kill a worker once every stream has had so many tokens; `of` max: once any has."""
    while not (streams.tokens and of(map(len, streams.tokens.values())) >= after):  # noqa: ASYNC110
        await trio.sleep(0.001)
    pid = worker_of(session, name).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
