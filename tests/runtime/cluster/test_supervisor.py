"""Real worker processes of an engine that computes nothing: their lives, and their end."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from waiting import until

from sagellm.graphs.ir import FrozenMap, Graph
from sagellm.runtime.cluster import WorkerUnfit
from sagellm.runtime.cluster.child_process import RestartPolicy
from sagellm.runtime.cluster.launch import ProcessLauncher
from sagellm.runtime.cluster.supervisor import Supervisor
from sagellm.runtime.cluster.worker import Watch, Worker
from sagellm.runtime.messages import SequenceState
from sagellm.runtime.port import Lost
from sagellm.runtime.sampling import Sampling

FOLDERS: dict[Supervisor, Path] = {}
QUICK = Watch(ping_s=0.02, silent_s=0.8, stop_s=5.0)


def graph(**options: Any) -> Graph:
    engines = FrozenMap({"e": FrozenMap({"model": "null", "device": "null", **options})})
    return Graph("g", "stream", (), (), FrozenMap({"engines": engines}))


@asynccontextmanager
async def supervised(
    replicas: int = 1, *, policy: RestartPolicy | None = None, **options: Any
) -> AsyncIterator[Supervisor]:
    launcher = ProcessLauncher("sagellm.opening.worker_main")
    supervisor = Supervisor(
        graph(**options),
        {"e": replicas},
        launcher,
        watch=QUICK,
        policy=policy or RestartPolicy(first_s=0.05),
    )
    folder = FOLDERS[supervisor] = launcher.folder
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        pids = [worker.pid for worker in supervisor.workers]
        try:
            yield supervisor
        finally:
            pids += [worker.pid for worker in supervisor.workers]
            nursery.cancel_scope.cancel()
    assert not any(pid is not None and psutil.pid_exists(pid) for pid in pids)
    assert not folder.exists()


async def test_workers_that_are_not_wanted_any_more_are_gone() -> None:
    async with supervised(2) as supervisor:
        first, second = supervisor.workers
        gone = second.pid
        await supervisor.scale("e", 1)
        assert supervisor.workers == (first,)
        assert gone is not None
        assert not psutil.pid_exists(gone)
        assert second.engine is not None
        assert second.engine.is_removed
        await supervisor.scale("e", 3)
        assert [str(worker) for worker in supervisor.workers] == ["e[0]", "e[1]", "e[2]"]
        assert {worker.state for worker in supervisor.workers} == {"ready"}
        assert not second.engine.is_removed


def sequence(number: int, num_tokens: int) -> SequenceState:
    return SequenceState(
        request_id=f"r{number}",
        owner="test",
        prompt_token_ids=(1, 2, 3),
        sampling=Sampling(max_tokens=num_tokens, ignore_eos=True),
    )


@pytest.mark.parametrize(("drain_s", "is_whole"), [(20.0, True), (0.0, False)])
async def test_a_worker_that_goes_may_end_its_sequences_first(
    drain_s: float, is_whole: bool
) -> None:
    async with supervised(2, decode_step_s=0.01) as supervisor:
        second = supervisor.workers[1]
        assert second.engine is not None
        await second.engine.submit(sequence(0, 50))
        assert not second.engine.is_idle
        events: list[Any] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(supervisor.scale, "e", 1, drain_s=drain_s))
            async for batch in second.engine.events("test"):
                events += batch
                if isinstance(batch[-1], Lost) or batch[-1].is_last:
                    break
                assert second.state == "drained"  # it gets nothing new meanwhile
        assert isinstance(events[-1], Lost) != is_whole
        assert sum(getattr(one, "num_tokens", 0) for one in events) == 50 or not is_whole
        assert len(supervisor.workers) == 1


async def test_a_drain_ends_in_any_case() -> None:
    async with supervised(2, decode_step_s=0.05) as supervisor:
        second = supervisor.workers[1]
        assert second.engine is not None
        await second.engine.submit(sequence(0, 400))  # 20 s
        with trio.fail_after(5):
            await supervisor.scale("e", 1, drain_s=0.3)
        assert second.engine.is_idle


async def test_those_that_serve_stay() -> None:
    async with supervised(2, policy=RestartPolicy(first_s=60.0)) as supervisor:
        first, second = supervisor.workers
        supervisor.drain(first)
        await supervisor.scale("e", 1)
        assert supervisor.workers == (second,)


async def test_a_restart_of_what_just_starts_is_no_fault_of_it() -> None:
    async with supervised(1) as supervisor, trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.scale, "e", 2)
        await until(lambda: len(supervisor.workers) == 2)
        await supervisor.restart(supervisor.workers[1:])
        assert [worker.state for worker in supervisor.workers] == ["ready", "ready"]


async def test_one_that_waits_for_its_restart_can_be_removed() -> None:
    async with supervised(2, policy=RestartPolicy(first_s=60.0)) as supervisor:
        worker = supervisor.workers[1]
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: worker.state == "dead")
        with trio.fail_after(5):
            await supervisor.scale("e", 1)
            await supervisor.scale("e", 2)
        assert worker.state == "ready"


async def test_a_replica_that_cannot_be_opened_leaves_all_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with supervised(1) as supervisor:
        monkeypatch.setenv("PYTHONPATH", "/nowhere")
        monkeypatch.setattr(supervisor._launcher, "_module", "no_such_module")
        with pytest.raises(WorkerUnfit, match=r"e\[1\]: exit code 1"):
            await supervisor.scale("e", 2)
        assert [str(worker) for worker in supervisor.workers] == ["e[0]"]
        assert supervisor.workers[0].state == "ready"
        monkeypatch.undo()
        await supervisor.scale("e", 2)
        assert [worker.state for worker in supervisor.workers] == ["ready", "ready"]


async def reborn(worker: Worker, epoch: int = 2) -> None:
    await until(lambda: worker.epoch >= epoch and worker.state == "ready")


async def test_workers_start_side_by_side_and_stop_in_order() -> None:
    async with supervised(3) as supervisor:
        assert [str(worker) for worker in supervisor.workers] == ["e[0]", "e[1]", "e[2]"]
        assert {worker.state for worker in supervisor.workers} == {"ready"}
        assert len({worker.pid for worker in supervisor.workers}) == 3
        assert FOLDERS[supervisor].stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
async def test_a_worker_that_dies_is_noticed_at_once_and_replaced(sent: signal.Signals) -> None:
    async with supervised() as supervisor:
        (worker,) = supervisor.workers
        seen: list[tuple[str, float]] = []
        supervisor.on_change = lambda worker: seen.append((worker.state, trio.current_time()))
        first = worker.pid
        assert first is not None
        killed_s = trio.current_time()
        os.kill(first, sent)
        await reborn(worker)
        assert [state for state, _ in seen] == ["dead", "ready"]
        assert seen[0][1] - killed_s < 0.25
        assert worker.restarts.count == 1
        assert worker.pid != first
        assert worker.why == "it ended"


async def test_a_worker_that_is_frozen_is_killed_and_replaced() -> None:
    async with supervised() as supervisor:
        (worker,) = supervisor.workers
        first = worker.pid
        assert first is not None
        frozen_s = trio.current_time()
        os.kill(first, signal.SIGSTOP)
        await until(lambda: worker.state != "ready")
        assert trio.current_time() - frozen_s < QUICK.silent_s + 0.5
        await reborn(worker)
        assert not psutil.pid_exists(first)


async def test_a_worker_that_dies_again_and_again_can_be_restarted_at_once() -> None:
    policy = RestartPolicy(first_s=60.0, longest_s=60.0, most=0)
    async with supervised(policy=policy) as supervisor:
        (worker,) = supervisor.workers
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: worker.state == "failing")
        assert worker.pid is None
        await supervisor.restart([worker])
        assert worker.is_serving


async def test_an_engine_that_cannot_be_opened_says_why() -> None:
    with pytest.raises(ExceptionGroup) as raised:
        async with supervised(num_blocks=1, max_model_len=4000):
            pass
    (unfit,) = leaves(raised.value)
    assert isinstance(unfit, WorkerUnfit)
    assert "engine e[0]: the KV pool has 1 blocks" in str(unfit)


def leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in leaves(part)]
    return [error]


PARENT = """
    import sys, trio
    sys.path.insert(0, {tests!r})
    from test_supervisor import FOLDERS, supervised

    async def main():
        async with supervised(2) as supervisor:
            print(FOLDERS[supervisor], *(worker.pid for worker in supervisor.workers), flush=True)
            await trio.sleep_forever()

    trio.run(main)
"""


@pytest.mark.parametrize("is_frozen", [False, True])
async def test_workers_do_not_outlive_a_killed_parent(is_frozen: bool) -> None:
    program = textwrap.dedent(PARENT).format(tests=str(Path(__file__).parent))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(  # noqa: ASYNC220 - brief
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=env
    ) as parent:
        assert parent.stdout is not None
        folder, *pids = (await trio.to_thread.run_sync(parent.stdout.readline)).split()
        if is_frozen:
            os.kill(int(pids[0]), signal.SIGSTOP)
        parent.kill()
    if is_frozen:
        os.kill(int(pids[0]), signal.SIGCONT)
    await until(lambda: not any(psutil.pid_exists(int(pid)) for pid in pids))
    await until(lambda: not Path(folder).exists())
