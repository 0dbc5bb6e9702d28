"""Workers that are killed under many long streams, and a worker whose engine hangs."""

import os
import sys
from functools import partial
from typing import Any

import pytest
from poisoned_worker import HANG
from process_streams import GREEDY, PROMPTS, killed, opened, stream_all
from waiting import until

from sagellm import Sampling
from sagellm.runtime.messages import SERVED

NUM_STREAMS = 64
LONG_GREEDY = Sampling(max_tokens=512, ignore_eos=True)
LONG_SEEDED = Sampling(max_tokens=512, ignore_eos=True, temperature=1.0, seed=9)
ROOMY = {"d.max_model_len": 1024, "p.max_model_len": 1024, "d.num_blocks": 4096}

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("sampling", [LONG_GREEDY, LONG_SEEDED], ids=["greedy", "seeded"])
async def test_sixty_four_streams_survive_a_killed_decode_worker(sampling: Sampling) -> None:
    prompts = dict(enumerate(PROMPTS[:NUM_STREAMS]))
    async with opened("pd_many", **ROOMY) as session:
        right = await stream_all(session, sampling, prompts=prompts)
        meanwhile = partial(killed, session, "d[0]", after=100)
        found = await stream_all(session, sampling, meanwhile, prompts=prompts)
        gaps = session.executor.core.recovery.gaps_s
    print(f"{gaps.num_samples} moved; longest wait {max(found.gaps_s.values()):.3f} s")
    assert found.tokens == right.tokens
    assert set(found.reasons.values()) == {"length"}
    assert gaps.num_samples > 0
    waits = sorted(found.gaps_s.values())
    assert waits[-1] < 2.0
    assert waits[NUM_STREAMS // 2] < 0.8


async def test_an_engine_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker process lives and answers. A request that hangs two engines is quarantined."""
    monkeypatch.setattr("sagellm.opening.worker_processes.WORKER_MODULE", "poisoned_worker")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    prompts: dict[int, Any] = {**dict(enumerate(PROMPTS[:12])), 12: [HANG, *range(20, 60)]}
    async with opened("pd_many", **{"executor.hang_s": 0.5}) as session:
        right = await stream_all(session, GREEDY)
        found = await stream_all(session, GREEDY, prompts=prompts)
        assert session.supervisor is not None
        workers = session.supervisor.workers
        await until(lambda: sum(one.restarts.count for one in workers) == 2)
        answer = await session.generate("And then", sampling=GREEDY)
    assert found.codes.pop(12) == "request_quarantined"
    assert found.tokens.pop(12) == []
    assert found.tokens == right.tokens
    assert answer.finish_reason in SERVED
