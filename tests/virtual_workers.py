"""A graph whose workers are tasks, in virtual time, and what may happen to them."""

import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio
from endings import generate

from sagellm import Graph, Sampling
from sagellm.backends.interface import Progress
from sagellm.builder import RESOLVER
from sagellm.graphs.ir import Graph as FrozenGraph
from sagellm.opening.checking import check_graph
from sagellm.opening.decisions import DecisionFile, recording
from sagellm.opening.graph_engines import num_replicas, open_replica
from sagellm.opening.tokenizers import load_models
from sagellm.runtime.cluster import CannotScale
from sagellm.runtime.cluster.child_process import RestartPolicy
from sagellm.runtime.cluster.launch import TaskLauncher, TaskLife
from sagellm.runtime.cluster.supervisor import Supervisor
from sagellm.runtime.cluster.worker import Watch
from sagellm.runtime.engine.kinds import ReplicaPlace
from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.runtime.executors.tasks import TasksExecutor
from sagellm.runtime.plan import plan
from sagellm.runtime.port import Engine
from sagellm.session import Session

# Deaths end a task, and are noticed by that; only silence needs asking, and may take its time.
# It came while nobody was there; or it was twice, without a token, in a worker as that died.
EXCUSED = ("unavailable", "request_quarantined")
OFTEN = RestartPolicy(most=10**6)  # they may die as often as they like, and are not failing
WATCH = Watch(ping_s=4.0, silent_s=9.0, stop_s=1.0)
ACTIONS = ("kill", "kill", "kill two", "mute", "garble", "restart", "scale", "scale", "drain")
OPTIONS = {"device": "null", "model": "null", "decode_step_s": 0.05, "prefill_token_s": 1e-3}


class Lives(TaskLauncher):
    """Notes the lives that it begins, so that they can be ended."""

    def __init__(self) -> None:
        self.engines: list[LocalEngine] = []
        self.lives: list[TaskLife] = []
        super().__init__(self._open)

    async def _open(
        self, graph: FrozenGraph, name: str, replica: int, _: int | None, progress: Progress
    ) -> Engine:
        await trio.sleep(2.0)  # what loading takes
        engine = await open_replica(graph, ReplicaPlace(name, replica))
        if isinstance(engine, LocalEngine):
            self.engines.append(engine)
        return engine

    def launch(self, epoch: int) -> TaskLife:
        self.lives.append(super().launch(epoch))
        return self.lives[-1]


@dataclass
class Chaos:
    """What is done to workers: one thing at a time, after a random while, drawn from one seed."""

    session: Session
    supervisor: Supervisor
    lives: Lives
    draw: random.Random
    done: list[tuple[float, str, str]] = field(default_factory=list)

    async def run(self, mean_s: float) -> None:
        while True:
            await trio.sleep(self.draw.expovariate(1 / mean_s))
            action = self.draw.choice(ACTIONS)
            await self._do(action)

    async def _do(self, action: str) -> None:
        workers = self.draw.sample(self.supervisor.workers, min(2, len(self.supervisor.workers)))
        self.done.append((trio.current_time(), action, str(workers[0])))
        lives = [life for one in workers if (life := self._life(one.pid)) is not None]
        match action:
            case "kill" if lives:
                lives[0].kill()
            case "kill two":
                for life in lives:
                    life.kill()
            case "mute" if lives:  # frozen: nothing that it says arrives any more
                lives[0].channel._take = lambda message: None  # type: ignore[method-assign]
            case "garble" if lives:  # the link ends, and the worker lives on for a while
                lives[0].channel.close("its checksum is wrong")
            case "restart":
                await self.supervisor.restart(workers[:1])
            case "scale":
                with suppress(CannotScale):
                    count = self.draw.randint(1, 3)
                    await self.supervisor.scale(workers[0].engine_name, count)
            case "drain":
                self.supervisor.drain(workers[0])
                await trio.sleep(self.draw.uniform(0.0, 20.0))
                await self.supervisor.restart(workers[:1])

    def _life(self, pid: int | None) -> TaskLife | None:
        return next((life for life in self.lives.lives if life.pid == pid), None)


@asynccontextmanager
async def chaotic(
    loaded: Graph,
    seed: int,
    *,
    max_hold_s: float = 1000.0,
    policy: RestartPolicy = OFTEN,
    decisions: Path | None = None,
) -> AsyncIterator[Chaos]:
    given = {f"{e}.{key}": value for e in loaded.ir.engines for key, value in OPTIONS.items()}
    graph = check_graph(loaded.document, RESOLVER, {}, given)
    lives, draw = Lives(), random.Random(seed)
    supervisor = Supervisor(
        graph,
        {engine: num_replicas(graph, engine) for engine in graph.engines},
        lives,
        watch=WATCH,
        policy=policy,
        draw=draw.random,
    )
    log = DecisionFile(decisions) if decisions is not None else None
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        engines = supervisor.engines
        counts = {name: len(replicas) for name, replicas in engines.items()}
        facts = {name: replicas[0].facts for name, replicas in engines.items()}
        ready = plan(graph, RESOLVER, counts, seed=seed, facts=facts)
        record = stack.enter_context(recording(log, ready, max_hold_s))
        make = partial(TasksExecutor, ready, engines=engines, max_hold_s=max_hold_s, record=record)
        session = Session(load_models(graph), make)
        session.supervisor = supervisor
        await nursery.start(session.executor.run)
        supervisor.watch(session.executor)
        yield Chaos(session, supervisor, lives, draw)
        await session.close()
        session.executor.core.ledger.check()
        nursery.cancel_scope.cancel()
    for engine in lives.engines:
        engine.pool.check()
        assert engine.pool.num_leased == 0


@dataclass
class Record:
    """What became of the requests of one run."""

    asked: dict[int, int] = field(default_factory=dict)  # tokens
    answers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)


async def bursts(session: Session, seed: int, seconds: float, mean_s: float) -> Record:
    """Bursts of up to eight requests; some callers lose patience."""
    draw, record, until_s = random.Random(f"load {seed}"), Record(), trio.current_time() + seconds

    async def ask(number: int, fields: dict[str, Any]) -> None:
        sampling = Sampling(max_tokens=fields["tokens"], ignore_eos=True, seed=number)
        with trio.move_on_after(fields["patience_s"]):
            prompt = [number % 256, number // 256, *[1] * 500]  # none is a prefix of another
            asked = prompt[: fields["prompt"]]
            answer = await generate(session, asked, sampling=sampling)
            record.reasons[answer.code or answer.finish_reason] += 1
            if answer.code not in EXCUSED or answer.token_ids:
                record.answers[number] = answer.token_ids

    number = 0
    async with trio.open_nursery() as nursery:
        while trio.current_time() < until_s:
            for _ in range(draw.randint(1, 8)):
                fields = {
                    "tokens": draw.randint(1, 40),
                    "prompt": draw.choice((5, 50, 500)),
                    "patience_s": draw.choice((1.0, 3.0, 1e6, 1e6)),
                }
                record.asked[number] = fields["tokens"]
                nursery.start_soon(ask, number, fields)
                number += 1
            await trio.sleep(draw.expovariate(1 / mean_s))
    await session.idle()
    return record
