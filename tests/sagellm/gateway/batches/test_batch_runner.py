"""The runner: it finds batches, shares its turns between tenants, and survives faults."""

import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from batch_calls import as_file, completion_line
from logged import logged
from stored_batches import (
    DONE,
    TENANT,
    ScriptedServer,
    claimed,
    new_batch,
    stored,
    stores_in,
    until,
)

from sagellm.gateway.batches import batch_runner, batch_work
from sagellm.gateway.batches.batch_runner import BatchRunner, Turns
from sagellm.gateway.batches.batch_store import Stores
from sagellm.gateway.metrics.meters import BatchMeters

Run = Callable[[Callable[[], Awaitable[Any]]], Any]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_work, "LOOK_S", 0.001)
    monkeypatch.setattr(batch_runner, "SCAN_S", 0.005)
    monkeypatch.setattr(batch_runner, "FAULT_S", 0.005)


def status_of(stores: Stores, batch_id: str) -> str:
    return stores.batches.record(TENANT, batch_id).status


def runner_of(stores: Stores, server: ScriptedServer, *tenants: str) -> BatchRunner:
    return BatchRunner(stores, server, BatchMeters(), tenants or (TENANT,))


def test_a_new_batch_is_worked_on(tmp_path: Path, run: Run) -> None:
    stores, server = stores_in(tmp_path), ScriptedServer()

    async def work() -> None:
        runner = runner_of(stores, server)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(runner.run)
            await anyio.lowlevel.checkpoint()
            batch = new_batch(stores, 3)
            runner.wake()
            await until(lambda: status_of(stores, batch.id) == "completed")
            tasks.cancel_scope.cancel()

    run(work)
    assert len(server.asked) == 3


async def test_during_a_drain_no_batch_is_claimed(tmp_path: Path) -> None:
    stores, server = stores_in(tmp_path), ScriptedServer(is_draining=True)
    new_batch(stores, 1)
    with anyio.move_on_after(0.05):
        await runner_of(stores, server).run()
    claimed(stores).release()
    assert server.asked == []


async def test_of_two_runners_one_works_on_a_batch_and_the_other_takes_over(tmp_path: Path) -> None:
    stores, first, second = stores_in(tmp_path), ScriptedServer(lambda body: None), ScriptedServer()
    batch = new_batch(stores, 1)
    async with anyio.create_task_group() as others:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(runner_of(stores, first).run)
            await until(lambda: len(first.asked) == 1)
            others.start_soon(runner_of(stores_in(tmp_path), second).run)
            await anyio.sleep(0.03)
            assert second.asked == []
            tasks.cancel_scope.cancel()
        await until(lambda: status_of(stores, batch.id) == "completed")
        others.cancel_scope.cancel()
    assert len(second.asked) == 1


async def test_a_fault_of_one_batch_ends_no_other_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores, server = stores_in(tmp_path), ScriptedServer()
    first, second = new_batch(stores, 1), new_batch(stores, 1)
    publish, faults = batch_work.publish, []

    def faulty(claim: Any) -> None:
        if claim.record.id == first.id and len(faults) < 3:
            faults.append(claim)
            raise OSError(errno.EIO, "broken")
        publish(claim)

    monkeypatch.setattr(batch_work, "publish", faulty)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(runner_of(stores, server).run)
        await until(lambda: status_of(stores, second.id) == "completed")
        await until(lambda: status_of(stores, first.id) == "completed")
        tasks.cancel_scope.cancel()
    assert (len(faults), len(server.asked)) == (3, 2)


async def test_a_folder_that_cannot_be_read_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores, looks = stores_in(tmp_path), []

    def broken(tenants: Any) -> Any:
        looks.append(tenants)
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(stores.batches, "claims", broken)
    with logged() as lines:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(runner_of(stores, ScriptedServer()).run)
            await until(lambda: len(looks) > 3)
            tasks.cancel_scope.cancel()
    assert [line["event"] for line in lines] == ["batches_unreadable"]


async def test_a_tenant_with_many_batches_has_no_more_turns_than_another(tmp_path: Path) -> None:
    stores = stores_in(tmp_path, num_batch_calls=2)
    server = ScriptedServer()
    for _ in range(4):
        new_batch(stores, 20)
    file = stored(stores, as_file([completion_line(number) for number in range(20)]), "bob")
    fields: dict[str, Any] = {"metadata": None, "output_life_s": None}
    batch = stores.batches.create(
        "bob", endpoint="/v1/completions", input_file_id=file.id, **fields
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(runner_of(stores, server, TENANT, "bob").run)
        await until(lambda: stores.batches.record("bob", batch.id).status == "completed")
        tasks.cancel_scope.cancel()
    first = server.tenants.index("bob")
    last = len(server.tenants) - 1 - server.tenants[::-1].index("bob")
    turns = server.tenants[first : last + 1]
    assert turns.count("bob") == 20
    assert turns.count(TENANT) <= 30  # equal shares: about 20
    assert server.most_open <= 2


async def test_a_cancelled_wait_takes_no_turn() -> None:
    turns = Turns(1)
    with await turns.take("a"):
        with anyio.move_on_after(0.005):
            await turns.take("b")
    with anyio.fail_after(5):
        with await turns.take("b"):
            pass


async def test_meters_count_batches_and_requests(tmp_path: Path) -> None:
    stores, meters = stores_in(tmp_path), BatchMeters()
    batch = new_batch(stores, 3)
    runner = BatchRunner(stores, ScriptedServer(lambda body: DONE), meters, (TENANT,))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(runner.run)
        await until(lambda: status_of(stores, batch.id) == "completed")
        await until(lambda: not meters.num_working)
        tasks.cancel_scope.cancel()
    assert (meters.batches, meters.requests) == ({"completed": 1}, {"answered": 3})
