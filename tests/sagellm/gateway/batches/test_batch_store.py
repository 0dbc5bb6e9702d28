"""Stored batches: one worker each, taken over from the dead, each for its tenant alone."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from logged import logged
from stored_batches import TENANT, claimed, full_disk, new_batch, stored, stores_in

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.batches import batch_store
from sagellm.gateway.batches.batch_store import BatchClaim, Stores


def finish(claim: BatchClaim) -> None:
    claim.save(claim.record.at("completed"))
    claim.close()
    claim.release()


def test_a_batch_is_claimed_once(tmp_path: Path) -> None:
    stores, other = stores_in(tmp_path), stores_in(tmp_path)
    batch = new_batch(stores, 1)
    claim = claimed(stores)
    assert claim.record.id == batch.id
    assert list(other.batches.claims([TENANT])) == []
    claim.release()
    with claimed(other) as again:
        assert again.record.id == batch.id


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    new_batch(stores, 1)
    [lock] = stores.folder.of(TENANT).open.glob("*.lock")
    program = "import fcntl,sys; f=open(sys.argv[1],'rb'); fcntl.flock(f,2); print(1,flush=True);"
    holder = subprocess.Popen(
        [sys.executable, "-c", program + "sys.stdin.read()", str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert list(stores.batches.claims([TENANT])) == []
        holder.kill()
        holder.wait()
    claimed(stores).release()


def test_an_ended_batch_is_not_claimed_and_leaves_no_open_file(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    batch = new_batch(stores, 1)
    finish(claimed(stores))
    assert list(stores.batches.claims([TENANT])) == []
    assert list(stores.folder.of(TENANT).open.iterdir()) == []
    assert stores.batches.record(TENANT, batch.id).status == "completed"


def test_a_crash_after_the_end_leaves_files_that_the_next_claim_removes(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    new_batch(stores, 1)
    with claimed(stores) as claim:
        claim.save(claim.record.at("completed"))
    assert list(stores.batches.claims([TENANT])) == []
    assert list(stores.folder.of(TENANT).open.iterdir()) == []


def test_only_batches_of_known_keys_are_worked_on(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    new_batch(stores, 1)
    assert list(stores.batches.claims(["bob"])) == []
    claimed(stores).release()


def test_another_tenant_finds_nothing(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    batch = new_batch(stores, 1)
    for act in (stores.batches.record, stores.batches.cancel):
        with pytest.raises(ApiError) as error:
            act("bob", batch.id)
        assert (error.value.status, error.value.code) == (404, "batch_not_found")
    assert list(stores.batches.records("bob")) == []
    assert [each.id for each in stores.batches.records(TENANT)] == [batch.id]


def test_a_batch_of_another_tenants_file_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    file = stored(stores, b"x", "bob")
    fields = {"endpoint": "/v1/completions", "metadata": None, "output_life_s": None}
    with pytest.raises(ApiError) as error:
        stores.batches.create(TENANT, input_file_id=file.id, **fields)  # type: ignore[arg-type]
    assert error.value.code == "file_not_found"
    assert list(stores.folder.of(TENANT).open.iterdir()) == []


def test_the_input_may_be_deleted(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    batch = new_batch(stores, 2)
    stores.files.delete(TENANT, batch.input_file_id)
    with claimed(stores) as claim:
        assert claim.path("input").read_bytes().count(b"\n") == 2


def test_a_cancelled_batch_is_seen_as_such_at_once_and_its_record_stays_the_workers(
    tmp_path: Path,
) -> None:
    stores = stores_in(tmp_path)
    batch = new_batch(stores, 1)
    with claimed(stores) as claim:
        assert not claim.is_cancelled
        seen = stores.batches.cancel(TENANT, batch.id)
        assert (seen.status, "cancelling" in seen.times) == ("cancelling", True)
        assert claim.is_cancelled
        claim.save(claim.record.at("in_progress"))
        assert stores.batches.record(TENANT, batch.id).status == "cancelling"
        finish(claim)
    assert stores.batches.record(TENANT, batch.id).status == "completed"
    with pytest.raises(ApiError) as error:
        stores.batches.cancel(TENANT, batch.id)
    assert (error.value.status, error.value.should_retry) == (409, False)


def test_a_key_has_so_many_batches_under_way(tmp_path: Path) -> None:
    stores = stores_in(tmp_path, num_batches=2)
    new_batch(stores, 1)
    new_batch(stores, 1)
    with pytest.raises(ApiError) as error:
        new_batch(stores, 1)
    assert (error.value.status, error.value.code) == (429, "too_many_batches")
    for claim in stores.batches.claims([TENANT]):
        finish(claim)
    new_batch(stores, 1)


def test_records_of_ended_batches_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_store, "MAX_RECORDS", 1)
    stores = stores_in(tmp_path)
    new_batch(stores, 1)
    finish(claimed(stores))
    with pytest.raises(ApiError) as error:
        new_batch(stores, 1)
    assert error.value.code == "storage_limit_exceeded"


def aged(stores: Stores, claim: BatchClaim) -> None:
    ended = claim.record.at("completed")
    claim.save(msgspec.structs.replace(ended, times={"completed": 0}))


def test_records_are_deleted_a_month_after_the_end(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    old, new = new_batch(stores, 1), new_batch(stores, 1)
    first, second = stores.batches.claims([TENANT])
    aged(stores, first)
    finish(second)
    first.close()
    first.release()
    stores.batches.sweep()
    assert [each.id for each in stores.batches.records(TENANT)] == [new.id]
    assert old.id != new.id


def test_what_a_crash_left_of_a_new_batch_is_deleted_after_a_while(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    own = stores.folder.of(TENANT)
    own.make()
    lock, lone = own.open / "batch_1.lock", own.open / "batch_2.cancel"
    new = own.batches / "batch_3.json.a.new"
    for path in (lock, lone, new):
        path.touch()
    stores.batches.sweep()
    assert (lone.exists(), new.exists()) == (False, True)
    os.utime(new, (0, 0))
    stores.batches.sweep()
    assert not new.exists()
    assert list(stores.batches.claims([TENANT])) == []
    assert lock.exists()  # its record may be about to come
    os.utime(lock, (0, 0))
    assert list(stores.batches.claims([TENANT])) == []
    assert not lock.exists()


def test_a_damaged_record_costs_no_results(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    batch = new_batch(stores, 1)
    own = stores.folder.of(TENANT)
    whole = (own.batches / f"{batch.id}.json").read_bytes()
    (own.batches / f"{batch.id}.json").write_bytes(b'{"id": 1}')
    os.utime(own.open / f"{batch.id}.lock", (0, 0))
    assert list(stores.batches.claims([TENANT])) == []
    (own.batches / f"{batch.id}.json").write_bytes(whole)
    with claimed(stores) as claim:
        assert claim.path("input").exists()


def test_a_damaged_record_is_logged_once_until_it_changes(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    batch = new_batch(stores, 1)
    path = stores.folder.of(TENANT).batches / f"{batch.id}.json"
    whole = path.read_bytes()
    with logged() as lines:
        for content in (b"{", b"{", b"[", whole, b"["):
            path.write_bytes(content)
            for _ in range(3):
                for claim in stores.batches.claims([TENANT]):
                    claim.release()
                list(stores.batches.records(TENANT))
    assert [(line["event"], line["path"]) for line in lines] == [("record_damaged", str(path))] * 3


def test_a_batch_that_cannot_be_read_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = stores_in(tmp_path)
    first, second = new_batch(stores, 1), new_batch(stores, 1)
    read = Path.read_bytes

    def broken(path: Path) -> bytes:
        if path.stem == first.id:
            raise OSError(errno.EIO, "broken")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", broken)
    with logged() as lines:
        for _ in range(3):
            with claimed(stores) as claim:
                assert claim.record.id == second.id
    assert [(line["event"], line["error"]) for line in lines] == [("batch_unreadable", "broken")]


def test_a_batch_that_a_full_disk_refuses_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = stores_in(tmp_path)
    monkeypatch.setattr(batch_store, "write_atomically", full_disk)
    with pytest.raises(ApiError) as error:
        new_batch(stores, 1)
    assert (error.value.status, error.value.code) == (507, "storage_full")
    own = stores.folder.of(TENANT)
    assert [*own.open.iterdir(), *own.batches.iterdir()] == []


def test_the_lock_of_the_folder_is_shared_by_processes(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    with (
        stores.folder.locked(),
        (tmp_path / "lock").open("rb") as other,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
