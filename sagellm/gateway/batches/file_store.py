"""Stored files: uploads, the records of files, and their deletion. All functions block."""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, BinaryIO

import msgspec

from sagellm.gateway.answers.stored_objects import FilePurpose, StoredFile
from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.batches.data_folder import (
    DataFolder,
    TenantFolder,
    ids_after,
    is_id,
    new_id,
    open_private,
    sync_folder,
    telling_full_disk,
    write_atomically,
)

PREFIX = "file-"
DEFAULT_LIFE_S = 30 * 86_400  # of an uploaded file, as in the OpenAI API
_ABANDONED_S = 3600.0  # what no record names is deleted after that time


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A stored file, as its record on the disk says. Times are seconds since 1970."""

    id: str
    tenant: str
    bytes: int
    created_at: int
    filename: str
    purpose: FilePurpose
    expires_at: int | None = None


def file_object(record: FileRecord) -> StoredFile:
    """Return a file as clients see it."""
    return StoredFile(
        id=record.id,
        bytes=record.bytes,
        created_at=record.created_at,
        expires_at=record.expires_at,
        filename=record.filename,
        purpose=record.purpose,
    )


def not_found(what: str) -> ApiError:
    return ApiError(404, f"there is no such {what}", param="id", code=f"{what}_not_found")


class Upload:
    """A file that is being written. The owner calls `discard` at the end, also after `commit`.

    The bytes of `num_reserved` count in the limits until the first of these calls.
    """

    def __init__(self, folder: DataFolder, tenant: str, num_reserved: int) -> None:
        self.id = new_id(PREFIX)
        self.num_bytes = 0
        self._tenant = tenant
        self._own = folder.of(tenant)
        self._part = self._own.files / f"{self.id}.part"
        self._file: IO[bytes] | None = None
        self._is_kept = False
        with telling_full_disk(), folder.locked():
            folder.check_room(self._own, num_reserved)
            self._own.make()
            self._file = open_private(self._part, "xb")
            try:
                self._file.truncate(num_reserved)  # a hole: it takes no blocks of the disk
            except OSError:
                self.discard()
                raise

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. Raises ApiError 507 if the disk is full."""
        assert self._file is not None
        with telling_full_disk():
            self._file.write(data)
        self.num_bytes += len(data)

    def commit(self, filename: str, life_s: int) -> FileRecord:
        """Keep the file, and return its record. Raises ApiError 507 if the disk is full."""
        assert self._file is not None
        created_s = int(time.time())
        record = FileRecord(
            id=self.id,
            tenant=self._tenant,
            bytes=self.num_bytes,
            created_at=created_s,
            filename=filename,
            purpose="batch",
            expires_at=created_s + life_s,
        )
        with telling_full_disk():
            self._file.flush()
            self._file.truncate(self.num_bytes)
            os.fsync(self._file.fileno())
            self._file.close()
            self._part.replace(content_path(self._own, self.id))
            save_record(self._own, record)
        self._is_kept = True
        return record

    def discard(self) -> None:
        """Delete what was written. Has no effect after `commit`."""
        if self._is_kept:
            return
        if self._file is not None:
            with suppress(OSError):  # a full disk: the buffered rest cannot be written
                self._file.close()
        self._part.unlink(missing_ok=True)
        _delete(self._own, self.id)  # of a commit that failed


def content_path(own: TenantFolder, file_id: str) -> Path:
    return own.files / f"{file_id}.data"


def record_path(own: TenantFolder, file_id: str) -> Path:
    return own.files / f"{file_id}.json"


def save_record(own: TenantFolder, record: FileRecord) -> None:
    """Write a file's record: from now on the file exists, and a sweep keeps its content."""
    sync_folder(own.files)
    write_atomically(record_path(own, record.id), msgspec.json.encode(record))


class FileStore:
    """The files of all tenants. A tenant finds its own files only."""

    def __init__(self, folder: DataFolder) -> None:
        self.folder = folder

    def begin_upload(self, tenant: str, num_bytes: int) -> Upload:
        """Begin to write a file of at most `num_bytes` bytes. Raises ApiError beyond a limit."""
        return Upload(self.folder, tenant, num_bytes)

    def record(self, tenant: str, file_id: str) -> FileRecord:
        """Return the record of a file. Raises ApiError 404."""
        own = self.folder.of(tenant)
        found = self._load(own, file_id) if is_id(file_id, PREFIX) else None
        if found is None or _is_over(found):
            raise not_found("file")
        return found

    def records(
        self, tenant: str, *, after: str = "", newest_first: bool = True
    ) -> Iterator[FileRecord]:
        """Yield the records of a tenant's files by their time. `after`: as in `ids_after`."""
        own = self.folder.of(tenant)
        for file_id in ids_after(_ids(own.files), after, newest_first=newest_first):
            found = self._load(own, file_id)
            if found is not None and not _is_over(found):
                yield found

    def open(self, tenant: str, file_id: str) -> BinaryIO:
        """Open the content of a file. Raises ApiError 404."""
        record = self.record(tenant, file_id)
        try:
            return content_path(self.folder.of(tenant), record.id).open("rb", buffering=0)
        except FileNotFoundError:  # deleted since
            raise not_found("file") from None

    def delete(self, tenant: str, file_id: str) -> None:
        """Delete a file. Raises ApiError 404. A batch that has begun keeps its own name of it."""
        record = self.record(tenant, file_id)
        _delete(self.folder.of(tenant), record.id)

    def sweep(self) -> None:
        """Delete files that have expired, and remains of uploads that were cut off."""
        for own in self.folder.tenants:
            for file_id in _ids(own.files):
                record = self._load(own, file_id)
                if record is not None and _is_over(record):
                    _delete(own, file_id)
            delete_abandoned(own.files.glob("*.part"))
            delete_abandoned(own.files.glob("*.new"))
            delete_abandoned(
                path for path in own.files.glob("*.data") if not path.with_suffix(".json").exists()
            )

    def _load(self, own: TenantFolder, file_id: str) -> FileRecord | None:
        return self.folder.read_record(record_path(own, file_id), FileRecord)


def _ids(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob(f"{PREFIX}*.json")}


def _is_over(record: FileRecord) -> bool:
    return record.expires_at is not None and record.expires_at <= time.time()


def _delete(own: TenantFolder, file_id: str) -> None:
    record_path(own, file_id).unlink(missing_ok=True)  # first: without a record there is no file
    content_path(own, file_id).unlink(missing_ok=True)


def delete_abandoned(paths: Iterable[Path]) -> None:
    """Delete files that nobody has written to for `_ABANDONED_S` seconds."""
    for path in paths:
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink()
