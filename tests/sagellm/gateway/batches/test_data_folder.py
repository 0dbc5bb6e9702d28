"""The folder of files and batches: its modes, its names, its writes and its limits."""

import errno
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from stored_batches import TENANT, claimed, full_disk, new_batch, stored, stores_in

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.batches import data_folder
from sagellm.gateway.batches.data_folder import (
    DataFolder,
    FolderInUse,
    held_data_folder,
    is_id,
    make_data_folder,
    new_id,
    telling_full_disk,
    write_atomically,
)
from sagellm.gateway.batches.results import ResultFiles
from sagellm.gateway.settings import StorageLimits


def test_the_folder_is_made_for_its_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "data"
    make_data_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.iterdir()) == []
    stored(stores_in(folder), b"x")
    modes = [path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_dir()]
    assert modes == [0o700] * 4


def test_other_users_cannot_open_files(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    batch = new_batch(stores, 1)
    stores.batches.cancel(TENANT, batch.id)
    with claimed(stores) as claim, closing(ResultFiles(claim)) as results:
        results.open()
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 9
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_a_folder_without_hard_links_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*paths: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match="not permitted"):
        make_data_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def refused(folder: Path, said: str) -> None:
    with pytest.raises(FolderInUse, match=said), held_data_folder(folder):
        pass


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    for _ in range(2):  # free again after the first end
        with held_data_folder(tmp_path):
            refused(tmp_path, f"process {os.getpid()} on .")
    assert (tmp_path / "server.lock").stat().st_mode & 0o777 == 0o600


def test_a_killed_server_leaves_its_folder_free(tmp_path: Path) -> None:
    program = "import fcntl,sys; f=open(sys.argv[1],'w'); fcntl.flock(f,2); f.write('process 7');"
    program += "f.flush(); print(1,flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path / "server.lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        refused(tmp_path, "process 7")
        holder.kill()
        holder.wait()
    with held_data_folder(tmp_path):
        pass


def test_a_full_disk_keeps_no_server_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", full_disk)
    with held_data_folder(tmp_path):
        refused(tmp_path, "another process")


def test_no_child_process_holds_the_folder_of_its_parent(tmp_path: Path) -> None:
    with held_data_folder(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child, held_data_folder(tmp_path):
        child.kill()


def test_ids_sort_by_time_and_are_the_only_names() -> None:
    ids = [new_id("file-") for _ in range(100)]
    assert sorted(ids) == ids
    assert len(set(ids)) == 100
    assert all(is_id(each, "file-") for each in ids)
    wrong = ("", "file-", "file-../../x", ids[0] + "\n", ids[0].upper(), ids[0] + "/x", "file-%00")
    assert not any(is_id(each, "file-") for each in wrong)
    assert not is_id(ids[0], "batch_")


@pytest.mark.parametrize("name", ["alice", "../bob", "a/b", "", "\x00", "x" * 1000])
def test_a_tenants_name_is_no_path(tmp_path: Path, name: str) -> None:
    folder = DataFolder(tmp_path, StorageLimits())
    assert folder.of(name).path.parent == tmp_path
    assert folder.of(name).path == folder.of(name).path != folder.of(name + "x").path


def test_a_write_that_fails_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="full"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["x"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_full_disk_is_told_and_other_faults_are_not_hidden() -> None:
    with pytest.raises(ApiError) as told, telling_full_disk():
        raise OSError(errno.ENOSPC, "full")
    assert (told.value.status, told.value.code, told.value.should_retry) == (
        507,
        "storage_full",
        False,
    )
    with pytest.raises(OSError, match="broken"), telling_full_disk():
        raise OSError(errno.EIO, "broken")


def test_a_file_with_two_names_counts_once(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    own = stores.folder.of(TENANT)
    file = stored(stores, b"x" * 100)
    os.link(own.files / f"{file.id}.data", own.open / "batch_x.input")
    size_of_record = (own.files / f"{file.id}.json").stat().st_size
    assert own.num_bytes == 100 + size_of_record
    stores.files.delete(TENANT, file.id)
    assert own.num_bytes == 100


def test_many_batches_at_work_measure_the_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = stores_in(tmp_path, files_bytes=600)
    own = stores.folder.of(TENANT)
    stored(stores, b"x" * 100)
    assert stores.folder.has_room(own)
    (own.open / "batch_x.output").write_bytes(b"x" * 1000)
    assert stores.folder.has_room(own)
    monkeypatch.setattr(data_folder, "_SIZES_S", 0.0)
    assert not stores.folder.has_room(own)


def test_all_tenants_share_one_limit(tmp_path: Path) -> None:
    stores = stores_in(tmp_path, all_files_bytes=1000)
    stored(stores, b"x" * 500)
    with pytest.raises(ApiError) as refused:
        stored(stores, b"x" * 500, "bob")
    assert (refused.value.status, refused.value.code) == (507, "storage_full")
    assert stores.folder.has_room(stores.folder.of(TENANT))
