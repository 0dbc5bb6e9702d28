"""Autoscaled workers that die, hang and restart, in virtual time: nothing is lost."""

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock
from virtual_workers import EXCUSED, Record, bursts, chaotic

from sagellm import Graph
from sagellm.backends.null import null_token
from sagellm.graphs.sections import ReplicaBounds
from sagellm.opening.decisions import replay
from sagellm.runtime.cluster.autoscaling import Autoscaling
from sagellm.runtime.core.accounting import ScalingMeter

SCALED = """
sagellm: 1
name: scaled
engines:
  g: {model: "null", device: "null", max_num_seqs: 2, num_blocks: 256, max_model_len: 2048}
operators:
  autoscale:
    op: autoscale
    engines: {g: {max: 3, start_s: 2, drain_s: 10}}
    interval_s: 5
    cool_down_s: 20
    slo_ttft_s: 2
  sort:      {op: policy_sort}
  route:     {op: route}
  generate:  {op: generate, engine: g}
edges:
  - source -> autoscale -> sort -> route -> generate -> sink
executor: {kind: processes}
"""


async def survives(folder: Path, seed: int, seconds: float) -> tuple[Record, ScalingMeter, int]:
    """The answers, the changes, and the most workers that there were."""
    path, most = folder / "scaled.yaml", 0
    path.write_text(SCALED)
    loaded, log = Graph.load(str(path)), folder / "log"
    async with chaotic(loaded, seed, decisions=log) as chaos, trio.open_nursery() as nursery:
        supervisor, executor = chaos.supervisor, chaos.session.executor
        autoscaling = Autoscaling(supervisor, executor, {"g": ReplicaBounds(3, drain_s=10.0)})
        await nursery.start(autoscaling.run)
        executor.scale = autoscaling.begin

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, len(supervisor.workers))
                await trio.sleep(0.5)

        nursery.start_soon(watch)
        if seed:
            nursery.start_soon(chaos.run, 30.0)
        record = await bursts(chaos.session, seed, seconds, 4.0)
        await trio.sleep(200.0 if not seed else 0.0)
        meter = executor.core.meter.scaling("g")
        if not seed:
            assert [worker.state for worker in supervisor.workers] == ["ready"]
        nursery.cancel_scope.cancel()
    vocab_size = chaos.lives.engines[0]._resources.vocab_size
    for number, answer in record.answers.items():
        asked = range(record.asked[number])
        assert answer == tuple(null_token(number, 0, at, vocab_size) for at in asked)
    assert replay(log, functions={}).difference is None
    return record, meter, most


@pytest.mark.parametrize("seed", range(4))  # without faults in the first
async def test_scaled_workers_lose_no_token_whatever_happens_to_them(
    seed: int, tmp_path: Path, autojump_clock: MockClock
) -> None:
    record, meter, most = await survives(tmp_path, seed, 900.0)
    assert set(record.reasons) <= {"length", *EXCUSED}
    assert len(record.answers) > 300
    assert most == 3
    assert sum(meter.changes.values()) >= 4
