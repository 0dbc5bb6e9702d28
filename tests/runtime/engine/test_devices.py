"""Engines on devices that are no CPU: with memory of their own and late results, one or two."""

from collections.abc import Iterator
from typing import Any

import pytest
import trio
import virtual_workers
from detached import DetachedBackend, DetachedStorage, Memory, Touched, installed
from endings import generate
from engine_driver import hand_over, running
from virtual_workers import Lives, chaotic

from sagellm import Graph, Sampling
from sagellm.backends import KVLayout
from sagellm.backends.interface import Progress
from sagellm.graphs.ir import Graph as FrozenGraph
from sagellm.opening.graph_engines import engine_options
from sagellm.runtime.engine.kinds.local import open_engine
from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.runtime.engine.options import EngineOptionError, EngineOptions
from sagellm.runtime.kv.memory import PoolBytes
from sagellm.runtime.kv.tcp import TcpTransport
from sagellm.runtime.kv.transport import Sharing

EXACT: dict[str, Any] = {"deterministic": True, "max_model_len": 512, "num_blocks": 64}


@pytest.fixture
def backend() -> Iterator[DetachedBackend]:
    with installed() as backend:
        yield backend


def opened(replica: int = 0, **options: Any) -> LocalEngine:
    options = {**EXACT, "device": "detached", **options}
    return open_engine(EngineOptions(**options), name="e", replica=replica)


@pytest.mark.parametrize("name", ["numpy", "tolist", "item", "data_ptr", "cpu"])
def test_memory_that_is_touched_says_so(name: str) -> None:
    with pytest.raises(Touched):
        getattr(Memory(b"123"), name)
    with pytest.raises(Touched):
        Memory(b"123")[0]
    with pytest.raises(Touched):
        Memory(b"123").opened("any key")


async def test_steps_are_fed_on_the_device_before_the_host_knows(backend: DetachedBackend) -> None:
    async with running(opened()) as [driver]:
        for number in range(4):
            await driver.submit(str(number), range(5 + number, 90), max_tokens=40)
        await driver.all_done()
    assert backend.num_fed > 20


async def test_replicas_take_devices_in_turn_unless_one_is_named(backend: DetachedBackend) -> None:
    def device(engine: LocalEngine) -> str:
        storage = engine._resources.runner.storage  # type: ignore[attr-defined]
        assert isinstance(storage, DetachedStorage)
        return storage.device

    assert [device(opened(replica)) for replica in range(3)] == [
        *("detached:0", "detached:1", "detached:0")
    ]
    assert device(opened(0, device="detached:1")) == "detached:1"


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("detached:2", "no detached:2 on this machine; there are detached:0, detached:1"),
        ("detached:", "'detached:' has no number after the colon; write detached or detached:0"),
        ("detached:x", "has no number after the colon"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    backend: DetachedBackend, device: str, reason: str
) -> None:
    with pytest.raises(EngineOptionError, match=reason):
        opened(device=device)


async def test_blocks_go_from_one_device_to_the_other(backend: DetachedBackend) -> None:
    prompt = range(5, 90)
    async with running(opened(0), opened(1)) as [prefill, decode]:
        alone = await prefill.submit("alone", prompt, max_tokens=20)
        await alone.done.wait()
        first, rest = await hand_over(prefill, decode, "r", prompt, max_tokens=20)
    assert first.token_ids + rest.token_ids == alone.token_ids


async def test_blocks_are_staged_over_tcp(
    backend: DetachedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagellm.runtime.kv.memory._CHUNK_BYTES", 4000)
    layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
    left, right = (backend.device(index).allocate(layout, 16) for index in range(2))
    sent, landed, layers = [slice(2, 7)], [slice(9, 14)], range(3)
    staged = left.stage(sent, layers)
    for number, view in enumerate(staged.views):
        view[:] = bytes([number]) * len(view)
    staged.commit()
    sender = TcpTransport(PoolBytes(left), "127.0.0.1")
    receiver = TcpTransport(PoolBytes(right), "127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.run)
        nursery.start_soon(receiver.run)
        source = await sender.offer(range(2, 7), lambda: None)
        await receiver.fetch(source, range(9, 14), lambda: None)
        nursery.cancel_scope.cancel()
    assert right.read(landed, layers) == left.read(sent, layers)
    assert right.checksum(landed, layers) == left.checksum(sent, layers)


@pytest.mark.in_process
async def test_workers_die_and_no_token_is_lost(
    backend: DetachedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def begun(
        lives: Lives, graph: FrozenGraph, name: str, replica: int, _: int | None, say: Progress
    ) -> LocalEngine:
        await trio.lowlevel.checkpoint()
        lives.engines.append(
            open_engine(
                engine_options(graph, name), name=name, replica=replica, sharing=Sharing("tcp")
            )
        )
        return lives.engines[-1]

    monkeypatch.setattr(Lives, "_open", begun)
    monkeypatch.setattr(virtual_workers, "OPTIONS", {**EXACT, "device": "detached"})
    sampling = Sampling(max_tokens=120, temperature=1.0, seed=3, ignore_eos=True)
    prompts = [list(range(5 + number, 60)) for number in range(6)]

    async def answers(session: Any, kills: bool) -> list[tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}

        async def ask(number: int) -> None:
            answer = await generate(session, prompts[number], sampling=sampling)
            found[number] = answer.token_ids

        async with trio.open_nursery() as nursery:
            for number in range(len(prompts)):
                nursery.start_soon(ask, number)
            if kills:
                await trio.sleep(0.05)
                for life in chaos.lives.lives[:2]:
                    life.kill()
        return [found[number] for number in range(len(prompts))]

    async with chaotic(Graph.load("pd_many"), 1) as chaos:
        undisturbed = await answers(chaos.session, kills=False)
        assert await answers(chaos.session, kills=True) == undisturbed
        assert {len(answer) for answer in undisturbed} == {120}
