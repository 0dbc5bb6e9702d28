"""What processes cost, and what they give: `sagellm bench processes`."""

import json
import math
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import trio
from cyclopts import App

from benchmarks.machine import cpu_name, describe
from benchmarks.shape import QWEN05
from benchmarks.transports import transports
from benchmarks.weights import model_folder
from sagellm import Graph, Sampling
from sagellm.backends.arrays import BFLOAT16
from sagellm.backends.cpu.kv_storage import CpuStorage
from sagellm.runtime.engine.remote_engine import RemoteEngine
from sagellm.runtime.kv.memory import PoolBytes, SharedMemory, SharedTransport
from sagellm.session import Session

RESULTS = Path(__file__).parent / "results"
PARTS = ("tokens", "cost", "hop", "handover", "transports", "itl")
APP = App(name="sagellm bench processes", help=__doc__)
NULL = {"g.model": "null", "g.kind": "modelled", "g.prefill_token_s": 0, "g.decode_step_s": 0}


@APP.default
def processes(*, parts: tuple[str, ...] = PARTS, rounds: int = 3, output: Path = RESULTS) -> None:
    """Measure executor `processes` beside `tasks`, in the same run.

    Parameters
    ----------
    parts
        May be repeated; all unless given: tokens (the same answers, and how fast), cost (CPU of the
        graph's process), hop (to a worker and back), handover (of KV blocks), transports (for
        these, beside ZeroMQ), itl (waits between tokens while long prompts come).
    rounds
        Of each measurement; the medians count.
    output
        The folder for processes-CPU.json.
    """
    measured = {
        **{"tokens": tokens, "cost": cost, "hop": hop},
        **{"handover": handover, "transports": transports, "itl": itl},
    }
    unknown = [part for part in parts if part not in measured]
    if unknown:
        raise SystemExit(f"no part {unknown[0]!r}: there are {', '.join(PARTS)}")
    record: dict[str, Any] = {
        "command": " ".join(["sagellm bench processes", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(),
    }
    for part in parts:
        record[part] = trio.run(measured[part], rounds)
        print(f"{part}: {json.dumps(record[part], indent=2)}", flush=True)
    output.mkdir(parents=True, exist_ok=True)
    name = f"processes-{re.sub('[^a-z0-9]+', '-', cpu_name().lower())}.json"
    (output / name).write_text(json.dumps(record, indent=2) + "\n")


async def tokens(rounds: int) -> dict[str, Any]:
    """Answers and seconds of `pd_many` over both executors, for 24 requests.

    Prompts have 40 to 132 tokens, answers 100.
    """
    prompts = [[*range(20, 60 + 4 * number)] for number in range(24)]
    sampling = Sampling(max_tokens=100, ignore_eos=True, temperature=1.0, seed=3)
    exact = {"p.deterministic": True, "d.deterministic": True}
    answers: dict[str, list[tuple[int, ...]]] = {}
    seconds: dict[str, list[float]] = {"tasks": [], "processes": []}
    for _ in range(rounds):
        for executor, found in seconds.items():
            async with Graph.load("pd_many").open(set=exact, executor=executor) as session:
                began_s = time.perf_counter()
                answers[executor] = await _answers(session, prompts, sampling)
                found.append(time.perf_counter() - began_s)
    return {
        "are_identical": answers["tasks"] == answers["processes"],
        "seconds": {name: round(median(found), 3) for name, found in seconds.items()},
    }


async def _answers(
    session: Session, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[tuple[int, ...]]:
    answers: list[tuple[int, ...]] = [()] * len(prompts)

    async def ask(number: int) -> None:
        answer = await session.generate(list(prompts[number]), sampling=sampling)
        answers[number] = answer.token_ids

    async with trio.open_nursery() as nursery:
        for number in range(len(prompts)):
            nursery.start_soon(ask, number)
    return answers


async def cost(rounds: int) -> dict[str, Any]:
    """Microseconds of CPU of the graph's process, with engines that take no time.

    2,000 requests of one token give the cost of a request; 100 requests of 401 tokens give the cost
    of a token. 16 requests run at a time.
    """
    found: dict[str, Any] = {}
    for executor in ("tasks", "processes"):
        options = {**NULL, "admission.max_queued": 4096}
        async with Graph.load("joint").open(set=options, executor=executor) as session:
            await _cpu_s(session, 200, 1)
            one = [await _cpu_s(session, 2000, 1) / 2000 for _ in range(rounds)]
            many = [await _cpu_s(session, 100, 401) / 100 for _ in range(rounds)]
        request_s = median(one)
        found[executor] = {
            "us_a_request": round(1e6 * request_s, 1),
            "us_a_token": round(1e6 * (median(many) - request_s) / 400, 2),
        }
    return found


async def _cpu_s(session: Session, num_requests: int, num_tokens: int) -> float:
    sampling = Sampling(max_tokens=num_tokens, ignore_eos=True)
    left = iter(range(num_requests))
    began_s = time.process_time()

    async def ask() -> None:
        for _ in left:
            await session.generate([1, 2, 3], sampling=sampling)

    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(ask)
    return time.process_time() - began_s


async def hop(rounds: int) -> dict[str, Any]:
    """Microseconds of a call to an idle worker and its answer, over 5,000 calls."""
    times = []
    async with Graph.load("joint").open(set=NULL, executor="processes") as session:
        (engine,) = session.executor.all_engines
        assert isinstance(engine, RemoteEngine)
        for _ in range(5000):
            began_s = time.perf_counter()
            await engine.idle()
            times.append(1e6 * (time.perf_counter() - began_s))
    times.sort()
    return {"p50_us": round(times[2500], 1), "p99_us": round(times[4950], 1)}


@asynccontextmanager
async def qwen(graph: str, executor: str, **options: Any) -> AsyncIterator[Session]:
    """A session of the 0.5B shape with random weights in bfloat16."""
    loaded = Graph.load(graph)
    shape = {"num_blocks": 1024, "max_model_len": 4096, "prefix_caching": False, **options}
    engines = {f"{name}.{key}": value for name in loaded.ir.engines for key, value in shape.items()}
    model = str(model_folder(QWEN05))
    async with loaded.open(set=engines, model=model, executor=executor) as session:
        yield session


async def handover(rounds: int) -> dict[str, Any]:
    """The time of a handover: from the first token of 2,048 to its blocks in the decode pool.

    Also the receiver's part of that time, and the time of a plain copy of as many bytes.
    """
    taken_ms = []
    async with qwen("pd", "processes") as session:
        for number in range(3 * rounds):
            prompt = np.random.default_rng(number).integers(0, 150_000, 2048).tolist()
            answer = await session.generate(prompt, sampling=Sampling(max_tokens=2))
            stamps = answer.stamps
            assert stamps.transferred_s is not None
            assert stamps.prefilled_s is not None
            taken_ms.append(1e3 * (stamps.transferred_s - stamps.prefilled_s))
        facts = session.executor.all_engines[0].facts
    num_blocks = 2048 // facts.block_size
    num_bytes = num_blocks * facts.kv_block_bytes
    plain_s = _memcpy_s(np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8))
    shared_s = _memcpy_s(_shared(num_bytes), _shared(num_bytes))
    fetched_s = await _fetch_s(num_blocks)
    return {
        "num_bytes": num_bytes,
        "all_ms": [round(one, 2) for one in taken_ms],
        "ms": round(median(taken_ms), 2),
        "receiver_ms": round(1e3 * fetched_s, 2),
        "memcpy_ms": round(1e3 * plain_s, 2),
        "receiver_share_of_memcpy": round(plain_s / fetched_s, 3),
        "shared_memcpy_ms": round(1e3 * shared_s, 2),
        "receiver_share_of_shared_memcpy": round(shared_s / fetched_s, 3),
    }


async def _fetch_s(num_blocks: int) -> float:
    """Seconds of the receiver's part: a copy from a mapped pool, and checksums."""
    head_dim = QWEN05.hidden // QWEN05.num_heads
    shape = (QWEN05.num_layers, 2, 4 * num_blocks, QWEN05.num_kv_heads, 16, head_dim)
    pools = []
    for _ in range(2):
        memory = SharedMemory(2 * math.prod(shape))
        pool = np.frombuffer(memory.view, dtype=BFLOAT16).reshape(shape)
        pool.view(np.uint16).fill(0x3FC0)  # 1.5
        pools.append(SharedTransport(PoolBytes(CpuStorage(pool)), memory))
    blocks, times = range(num_blocks, 2 * num_blocks), []
    for _ in range(9):
        source = await pools[0].offer(blocks, lambda: None)
        began_s = time.perf_counter()
        await pools[1].fetch(source, blocks, lambda: None)
        times.append(time.perf_counter() - began_s)
    return median(times)


def _shared(num_bytes: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Shared memory like a pool's: in pages of 4 KiB if the system shares no larger pages."""
    shared = np.frombuffer(SharedMemory(num_bytes).view, np.uint8)
    shared.fill(1)
    return shared


def _memcpy_s(source: Any, target: Any) -> float:
    """Seconds of a plain copy between pages that are already mapped."""
    times = []
    for _ in range(9):
        began_s = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - began_s)
    return median(times)


@dataclass
class Waits:
    """Seconds between the tokens of decoding streams while prompts of 2,048 tokens arrive."""

    itl_s: list[float] = field(default_factory=list)
    num_prompts: int = 0
    elapsed_s: float = 0.0

    @property
    def summary(self) -> dict[str, float]:
        ordered = sorted(self.itl_s)
        return {
            "itl_p50_ms": round(1e3 * ordered[len(ordered) // 2], 1),
            "itl_p99_ms": round(1e3 * ordered[int(0.99 * len(ordered))], 1),
            "tokens_per_s": round(len(ordered) / self.elapsed_s, 1),
            "prompts_per_s": round(self.num_prompts / self.elapsed_s, 3),
        }


async def itl(rounds: int) -> dict[str, Any]:
    """Waits of four streams that decode for 20 s; a prompt of 2,048 tokens arrives every 4 s."""
    found: dict[str, Any] = {"pd, processes": await _waits("pd", "processes", {"threads": 1})}
    for budget in (512, 256, 128, 64):
        options = {"threads": 2, "max_num_batched_tokens": budget}
        found[f"joint, {budget} a step"] = await _waits("joint", "tasks", options)
    return found


async def _waits(graph: str, executor: str, options: dict[str, Any]) -> dict[str, float]:
    waits = Waits()
    async with qwen(graph, executor, **options) as session, trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(_decode, session, number, waits)
        await trio.sleep(5)  # by then all four streams decode
        waits.itl_s.clear()
        began_s = trio.current_time()
        with trio.move_on_after(20):
            async with trio.open_nursery() as prompts:
                for number in range(5):
                    prompts.start_soon(_prompt, session, number, waits)
                    await trio.sleep(4)
        waits.elapsed_s = trio.current_time() - began_s
        nursery.cancel_scope.cancel()
    return waits.summary


async def _decode(session: Session, number: int, waits: Waits) -> None:
    prompt = np.random.default_rng(number).integers(0, 150_000, 64).tolist()
    last_received_s = None
    sampling = Sampling(max_tokens=4000, ignore_eos=True)
    async with session.stream(prompt, sampling=sampling) as stream:
        async for _ in stream:
            now = trio.current_time()
            if last_received_s is not None:
                waits.itl_s.append(now - last_received_s)
            last_received_s = now


async def _prompt(session: Session, number: int, waits: Waits) -> None:
    prompt = np.random.default_rng(100 + number).integers(0, 150_000, 2048).tolist()
    await session.generate(prompt, sampling=Sampling(max_tokens=1))
    waits.num_prompts += 1


if __name__ == "__main__":
    APP()
