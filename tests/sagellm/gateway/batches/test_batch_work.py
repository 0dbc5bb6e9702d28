"""The work on one batch: every request has one result, whatever interrupts the work."""

import errno
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from batch_calls import completion_line
from stored_batches import (
    BUSY,
    DONE,
    TENANT,
    ScriptedServer,
    claimed,
    new_batch,
    stored,
    stores_in,
    until,
    worked,
    written,
)

from sagellm.gateway.batches import batch_work
from sagellm.gateway.batches.batch_record import BatchRecord, BatchTokens
from sagellm.gateway.batches.batch_store import Stores
from sagellm.gateway.batches.batch_work import LineReply

Run = Callable[[Callable[[], Awaitable[Any]]], Any]
WRONG = LineReply(400, b'{"error":{"code":null}}')


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_work, "LOOK_S", 0.001)
    monkeypatch.setattr(batch_work, "FIRST_RETRY_S", 0.001)
    monkeypatch.setattr(batch_work, "LATE_S", 0.001)


def names(stores: Stores, file_id: str) -> list[str]:
    return sorted(line["custom_id"] for line in written(stores, file_id))


def test_every_request_is_answered_in_the_tenants_name(tmp_path: Path, run: Run) -> None:
    stores, server = stores_in(tmp_path), ScriptedServer()
    new_batch(stores, 9)
    record = run(lambda: worked(stores, server))
    assert (record.status, record.total, record.completed, record.failed) == ("completed", 9, 9, 0)
    assert record.tokens == BatchTokens(input=27, output=18)
    assert list(record.times) == ["in_progress", "finalizing", "completed"]
    assert names(stores, record.output_id) == [f"c-{number}" for number in range(9)]
    assert record.error_id == ""
    assert server.tenants == [TENANT] * 9
    assert server.most_open <= 4
    assert list(stores.folder.of(TENANT).open.iterdir()) == []


async def test_answers_and_errors_are_in_files_of_their_own(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    server = ScriptedServer(lambda body: WRONG if body["max_tokens"] == 9 else DONE)
    new_batch(stores, [completion_line(0), completion_line(1, max_tokens=9)])
    record = await worked(stores, server)
    assert (record.completed, record.failed) == (1, 1)
    [answer], [error] = written(stores, record.output_id), written(stores, record.error_id)
    assert answer["response"]["status_code"] == 200
    assert answer["id"] == f"batch_req_{answer['response']['request_id']}"
    assert (error["custom_id"], error["error"]) == ("c-1", None)
    assert error["response"]["body"] == {"error": {"code": None}}


@pytest.mark.parametrize("status", [429, 503])
async def test_a_refusal_for_overload_is_no_result(tmp_path: Path, status: int) -> None:
    stores, replies = stores_in(tmp_path), []

    def reply(body: Any) -> LineReply:
        replies.append(body)
        return DONE if len(replies) > 5 else LineReply(status, BUSY.body, "queue_full", 0.001)

    new_batch(stores, 2)
    record = await worked(stores, ScriptedServer(reply))
    assert (record.completed, record.failed, len(replies)) == (2, 0, 7)


async def test_a_request_that_the_operator_ended_has_failed(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    new_batch(stores, 1)
    record = await worked(stores, ScriptedServer(lambda body: LineReply(503, b"{}", "abort")))
    assert (record.completed, record.failed) == (0, 1)


class LateServer(ScriptedServer):
    """A server whose loop is too late at the first five looks. `seen`: requests at each look."""

    seen: list[int]

    @property
    def is_too_late(self) -> bool:
        self.seen.append(len(self.asked))
        return len(self.seen) <= 5


async def test_no_request_begins_while_the_loop_is_too_late(tmp_path: Path) -> None:
    stores, server = stores_in(tmp_path), LateServer()
    server.seen = []
    new_batch(stores, 2)
    assert (await worked(stores, server)).completed == 2
    assert server.seen[:6] == [0] * 6


async def test_a_wrong_input_fails_with_the_lines(tmp_path: Path) -> None:
    stores, server = stores_in(tmp_path), ScriptedServer()
    new_batch(stores, [completion_line(0), {"custom_id": "x"}])
    record = await worked(stores, server)
    assert (record.status, server.asked) == ("failed", [])
    assert [error.line for error in record.errors] == [2]
    assert (record.output_id, record.error_id) == ("", "")
    assert "failed" in record.times


def held_after(num: int) -> ScriptedServer:
    """A server that answers so many requests, and then none."""
    server = ScriptedServer()
    server.reply = lambda body: DONE if len(server.asked) <= num else None
    return server


async def interrupted(stores: Stores, server: ScriptedServer, num: int) -> None:
    """Work until so many results are stored; then everything is cancelled, as a crash does."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worked, stores, server)
        await until(lambda: num_results(stores) >= num)
        tasks.cancel_scope.cancel()


def num_results(stores: Stores) -> int:
    found = stores.folder.of(TENANT).open.glob("*.output")
    return sum(path.read_bytes().count(b"\n") for path in found)


async def test_what_has_a_result_is_not_asked_again(tmp_path: Path) -> None:
    stores, second = stores_in(tmp_path), ScriptedServer()
    new_batch(stores, 8)
    await interrupted(stores, held_after(5), 5)
    record = await worked(stores, second)
    assert (record.completed, len(second.asked)) == (8, 3)
    assert names(stores, record.output_id) == [f"c-{number}" for number in range(8)]


async def test_a_drain_lets_running_requests_finish_and_begins_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_work, "LOOK_S", 1e6)  # each request looks for itself
    stores, server, held = stores_in(tmp_path), held_after(2), anyio.Event()
    new_batch(stores, 8)
    records: list[BatchRecord] = []

    async def work() -> None:
        records.append(await worked(stores, server))

    async with anyio.create_task_group() as tasks:
        server.reply = lambda body: DONE
        hold(server, held)
        tasks.start_soon(work)
        await until(lambda: server.num_open == 4)
        server.is_draining = True
        held.set()
    assert records[0].status == "in_progress"
    assert num_results(stores) == len(server.asked) == 4
    again = ScriptedServer()
    assert (await worked(stores, again)).completed == 8
    assert len(again.asked) == 4


def hold(server: ScriptedServer, until: anyio.Event) -> None:
    """Let answers wait for an event."""
    answer = server.answer

    async def held(*asked: Any) -> LineReply:
        await until.wait()
        return await answer(*asked)

    server.answer = held  # type: ignore[method-assign]


async def test_a_drain_does_not_wait_for_a_retry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_work, "FIRST_RETRY_S", 1e6)
    stores, server = stores_in(tmp_path), ScriptedServer(lambda body: BUSY)
    new_batch(stores, 1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worked, stores, server)
        await until(lambda: bool(server.asked))
        server.is_draining = True
    assert len(server.asked) == 1


async def test_a_cancel_ends_running_requests_and_keeps_results(tmp_path: Path) -> None:
    stores, server = stores_in(tmp_path), held_after(3)
    batch = new_batch(stores, 8)
    records: list[BatchRecord] = []

    async def work() -> None:
        records.append(await worked(stores, server))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        await until(lambda: num_results(stores) == 3)
        stores.batches.cancel(TENANT, batch.id)
    [record] = records
    assert (record.status, record.completed, record.failed) == ("cancelled", 3, 0)
    assert len(written(stores, record.output_id)) == 3
    assert {"cancelling", "cancelled"} <= record.times.keys()


async def test_what_is_not_answered_in_time_gets_an_error(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    new_batch(stores, 8)
    await interrupted(stores, held_after(5), 5)
    with claimed(stores) as claim:
        late = int(time.time()) - 86_400
        claim.save(msgspec.structs.replace(claim.record, created_at=late))
    record = await worked(stores, ScriptedServer(lambda body: None))
    assert (record.status, record.completed, record.failed) == ("expired", 5, 3)
    errors = written(stores, record.error_id)
    assert {line["error"]["code"] for line in errors} == {"batch_expired"}
    both = [*names(stores, record.output_id), *names(stores, record.error_id)]
    assert sorted(both) == [f"c-{number}" for number in range(8)]


async def test_results_beyond_the_limit_of_the_key_end_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_work, "SAVE_S", 0.0)
    stores = stores_in(tmp_path, files_bytes=6000)
    large = LineReply(200, b'"' + b"x" * 3000 + b'"')
    server = ScriptedServer()
    server.reply = lambda body: large if len(server.asked) <= 2 else None
    new_batch(stores, 8)
    record = await worked(stores, server, num_at_once=2)
    assert record.status == "failed"
    assert [error.code for error in record.errors] == ["storage_limit_exceeded"]
    assert len(written(stores, record.output_id)) == record.completed == 2


async def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = stores_in(tmp_path)
    new_batch(stores, 4)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", full)
        with pytest.raises(ExceptionGroup) as group:
            await worked(stores, ScriptedServer())
    assert group.value.subgroup(OSError) is not None
    assert num_results(stores) == 0
    assert (await worked(stores, ScriptedServer())).completed == 4


async def test_an_end_that_was_cut_off_is_repeated_without_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores, again = stores_in(tmp_path), ScriptedServer()
    new_batch(stores, 2)

    def crash(claim: Any) -> None:
        raise OSError(errno.EIO, "power")

    with monkeypatch.context() as patched:
        patched.setattr(batch_work, "published", crash)  # between the files and the record
        with pytest.raises(OSError, match="power"):
            await worked(stores, ScriptedServer())
    assert stores.batches.record(TENANT, claimed_id(stores)).status == "finalizing"
    record = await worked(stores, again)
    assert (record.status, again.asked) == ("completed", [])
    assert len(written(stores, record.output_id)) == 2
    assert len(list(stores.files.records(TENANT))) == 2  # the input, and one of results


def claimed_id(stores: Stores) -> str:
    with claimed(stores) as claim:
        return claim.record.id


async def test_a_limit_that_became_lower_ends_the_batch_with_its_results(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    new_batch(stores, 8)
    await interrupted(stores, held_after(5), 5)
    record = await worked(stores_in(tmp_path, num_batch_requests=4), ScriptedServer())
    assert (record.status, [error.code for error in record.errors]) == (
        "failed",
        ["too_many_requests"],
    )
    assert len(written(stores, record.output_id)) == 5


async def test_counts_are_seen_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_work, "SAVE_S", 0.0)
    stores, server = stores_in(tmp_path), held_after(3)
    batch = new_batch(stores, 8)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worked, stores, server)
        await until(lambda: stores.batches.record(TENANT, batch.id).completed == 3)
        tasks.cancel_scope.cancel()
    assert stored(stores, b"x").bytes == 1
