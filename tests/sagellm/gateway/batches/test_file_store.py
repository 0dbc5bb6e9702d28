"""Stored files: whole or not there, each for its tenant alone, within limits, until they expire."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from logged import logged
from stored_batches import TENANT, full_disk, stored, stores_in

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.batches import file_store
from sagellm.gateway.batches.batch_store import Stores


def status_of(call: Callable[[], object]) -> tuple[int, str | None]:
    with pytest.raises(ApiError) as error:
        call()
    return error.value.status, error.value.code


def test_a_file_is_found_as_it_was_written(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    file = stored(stores, b"abc")
    found = stores.files.record(TENANT, file.id)
    assert (found, found.bytes, found.purpose) == (file, 3, "batch")
    assert found.expires_at == found.created_at + 3600
    with stores.files.open(TENANT, file.id) as content:
        assert content.read() == b"abc"


def test_another_tenant_finds_nothing(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    file = stored(stores, b"abc")
    for act in (stores.files.record, stores.files.open, stores.files.delete):
        assert status_of(lambda act=act: act("bob", file.id)) == (404, "file_not_found")  # type: ignore[misc]
    assert list(stores.files.records("bob")) == []
    assert stores.files.record(TENANT, file.id) == file


@pytest.mark.parametrize("name", ["", "file-", "../x", "file-" + "0" * 32, "file-\x00", "x" * 9999])
def test_what_is_no_id_is_not_found(tmp_path: Path, name: str) -> None:
    stores = stores_in(tmp_path)
    stored(stores, b"abc")
    assert status_of(lambda: stores.files.open(TENANT, name)) == (404, "file_not_found")


def test_files_are_listed_by_age(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    ids = [stored(stores, b"x").id for _ in range(3)]
    assert [each.id for each in stores.files.records(TENANT)] == ids[::-1]
    assert [each.id for each in stores.files.records(TENANT, newest_first=False)] == ids
    assert [each.id for each in stores.files.records(TENANT, after=ids[1])] == ids[:1]
    later = stores.files.records(TENANT, after=ids[1], newest_first=False)
    assert [each.id for each in later] == ids[2:]


def test_a_deleted_file_is_gone_and_an_open_one_is_read_to_its_end(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    file = stored(stores, b"abc")
    with stores.files.open(TENANT, file.id) as content:
        stores.files.delete(TENANT, file.id)
        assert content.read() == b"abc"
    assert status_of(lambda: stores.files.record(TENANT, file.id)) == (404, "file_not_found")
    assert list(stores.folder.of(TENANT).files.iterdir()) == []


def test_a_key_has_so_many_files_and_bytes(tmp_path: Path) -> None:
    stores = stores_in(tmp_path, num_files=2, files_bytes=10_000)
    stored(stores, b"x")
    full = (400, "storage_limit_exceeded")
    assert status_of(lambda: stored(stores, b"x" * 10_001)) == full
    first = stored(stores, b"x")
    assert status_of(lambda: stored(stores, b"x")) == full
    stored(stores, b"x", "bob")
    stores.files.delete(TENANT, first.id)
    stored(stores, b"x")


def test_uploads_under_way_count_with_what_they_may_become(tmp_path: Path) -> None:
    stores = stores_in(tmp_path, files_bytes=1000)
    first = stores.files.begin_upload(TENANT, 600)
    assert status_of(lambda: stores.files.begin_upload(TENANT, 600))[0] == 400
    first.discard()
    second = stores.files.begin_upload(TENANT, 600)
    second.write(b"x")
    assert second.commit("x", 3600).bytes == 1
    second.discard()
    assert [each.bytes for each in stores.files.records(TENANT)] == [1]
    stores.files.begin_upload(TENANT, 600).discard()


@pytest.mark.parametrize("broken", ["os.fsync", f"{file_store.__name__}.write_atomically"])
def test_a_full_disk_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    stores = stores_in(tmp_path)
    upload = stores.files.begin_upload(TENANT, 10)
    upload.write(b"x")
    with monkeypatch.context() as patched:
        patched.setattr(broken, full_disk)
        assert status_of(lambda: upload.commit("x", 3600)) == (507, "storage_full")
    upload.discard()
    assert list(stores.folder.of(TENANT).files.iterdir()) == []


def test_an_upload_without_room_on_the_disk_leaves_no_file(tmp_path: Path) -> None:
    stores = stores_in(tmp_path, files_bytes=1 << 62, all_files_bytes=1 << 62)
    with pytest.raises((ApiError, OSError)):
        stores.files.begin_upload(TENANT, 1 << 61)  # no file system has files of that size
    assert list(stores.folder.of(TENANT).files.iterdir()) == []


def aged(stores: Stores) -> None:
    for path in stores.folder.of(TENANT).files.iterdir():
        os.utime(path, (0, 0))


def test_what_has_expired_is_not_found_and_then_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = stores_in(tmp_path)
    file = stored(stores, b"abc")
    assert file.expires_at is not None
    monkeypatch.setattr(file_store.time, "time", lambda: float(file.expires_at or 0))
    assert status_of(lambda: stores.files.record(TENANT, file.id))[0] == 404
    assert list(stores.files.records(TENANT)) == []
    stores.files.sweep()
    assert list(stores.folder.of(TENANT).files.iterdir()) == []


def test_remains_of_a_crash_are_deleted_after_a_while_and_files_stay(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    file = stored(stores, b"abc")
    own = stores.folder.of(TENANT)
    remains = [own.files / name for name in ("file-1.part", "file-2.data", "file-3.json.a.new")]
    for path in remains:
        path.touch()
    stores.files.sweep()
    assert all(path.exists() for path in remains)  # another process may be writing them
    aged(stores)
    stores.files.sweep()
    assert not any(path.exists() for path in remains)
    assert stores.files.record(TENANT, file.id) == file


def test_a_damaged_record_hides_one_file_and_no_other(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    first, second = stored(stores, b"a"), stored(stores, b"b")
    (stores.folder.of(TENANT).files / f"{first.id}.json").write_bytes(b'{"id": \xff')
    with logged() as lines:
        for _ in range(2):
            assert [each.id for each in stores.files.records(TENANT)] == [second.id]
    assert [line["event"] for line in lines] == ["record_damaged"]
