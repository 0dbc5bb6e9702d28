"""Stored batches: their records, who works on them, and the request to cancel them.

While a batch has not ended, the folder `open` of its tenant holds

    batch_ID.lock       held by the process that works on the batch, until that process ends
    batch_ID.input      a second name of the input file, which may be deleted meanwhile
    batch_ID.output     results, one line each; batch_ID.errors: those of failed requests
    batch_ID.cancel     there if a client cancelled the batch

Only the holder of the lock writes the record. All functions block.
"""

import fcntl
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.batches.batch_record import BatchRecord
from sagellm.gateway.batches.data_folder import (
    DataFolder,
    TenantFolder,
    ids_after,
    is_id,
    new_id,
    sync_folder,
    telling_full_disk,
    write_atomically,
)
from sagellm.gateway.batches.file_store import PREFIX as FILE_PREFIX
from sagellm.gateway.batches.file_store import (
    FileStore,
    content_path,
    delete_abandoned,
    not_found,
)
from sagellm.gateway.settings import StorageLimits

PREFIX = "batch_"
KEPT_S = 30 * 86_400  # how long the record of an ended batch is kept
MAX_RECORDS = 10_000  # records of one tenant, ended batches included
# In the order of their deletion. The lock is last: a batch is open until then.
_PARTS = (".input", ".output", ".errors", ".cancel", ".lock")
_LONE_S = 3600.0  # files of a batch without a record are deleted after that time


class BatchClaim:
    """A batch that this process alone works on, until `release`. `paths` are its open files."""

    def __init__(self, own: TenantFolder, record: BatchRecord, lock: BinaryIO) -> None:
        self.own = own
        self.record = record
        self._lock = lock

    def path(self, part: str) -> Path:
        """Return the path of an open file: "input", "output", "errors" or "cancel"."""
        return self.own.open / f"{self.record.id}.{part}"

    @property
    def is_cancelled(self) -> bool:
        return self.path("cancel").exists()

    def save(self, record: BatchRecord) -> None:
        """Replace the record. Raises OSError."""
        write_atomically(_record_path(self.own, record.id), msgspec.json.encode(record))
        self.record = record

    def close(self) -> None:
        """Delete the open files of a batch that has ended. Its lock is deleted last."""
        for part in _PARTS:
            (self.own.open / f"{self.record.id}{part}").unlink(missing_ok=True)

    def release(self) -> None:
        """Let another process, or a later claim, go on with the batch."""
        self._lock.close()

    def __enter__(self) -> "BatchClaim":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class BatchStore:
    """The batches of all tenants. A tenant finds its own batches only."""

    def __init__(self, folder: DataFolder) -> None:
        self.folder = folder

    def create(
        self,
        tenant: str,
        *,
        endpoint: str,
        input_file_id: str,
        metadata: dict[str, str] | None,
        output_life_s: int | None,
    ) -> BatchRecord:
        """Store a new batch. Raises ApiError for an unknown file, or beyond a limit."""
        own = self.folder.of(tenant)
        record = BatchRecord(
            id=new_id(PREFIX),
            tenant=tenant,
            endpoint=endpoint,
            input_file_id=input_file_id,
            created_at=int(time.time()),
            output_id=new_id(FILE_PREFIX),
            error_id=new_id(FILE_PREFIX),
            metadata=metadata,
            output_life_s=output_life_s,
        )
        with telling_full_disk(), self.folder.locked():
            own.make()
            self._check_room(own)
            self._open(own, record)
        return record

    def record(self, tenant: str, batch_id: str) -> BatchRecord:
        """Return the record of a batch. Raises ApiError 404."""
        own = self.folder.of(tenant)
        found = self._load(own, batch_id) if is_id(batch_id, PREFIX) else None
        if found is None:
            raise not_found("batch")
        return _seen(own, found)

    def records(self, tenant: str, *, after: str = "") -> Iterator[BatchRecord]:
        """Yield the records of a tenant's batches, newest first. `after`: as in `ids_after`."""
        own = self.folder.of(tenant)
        for batch_id in ids_after(_ids(own), after, newest_first=True):
            found = self._load(own, batch_id)
            if found is not None:
                yield _seen(own, found)

    def cancel(self, tenant: str, batch_id: str) -> BatchRecord:
        """Ask the process that works on a batch to cancel it. Raises ApiError 404 and 409."""
        record = self.record(tenant, batch_id)
        if record.has_ended:
            message = f"the batch has ended: its status is {record.status}"
            raise ApiError(409, message, param="id", code="batch_ended", should_retry=False)
        own = self.folder.of(tenant)
        with telling_full_disk():
            (own.open / f"{record.id}.cancel").touch(mode=0o600)
        return _seen(own, record)

    def claims(self, tenants: Collection[str]) -> Iterator[BatchClaim]:
        """Yield claims of the batches that no process works on, oldest first.

        Only batches of `tenants`: a key that was removed must not cause work. The caller must
        release each claim. A batch that cannot be read is logged and left out.
        """
        for tenant in tenants:
            own = self.folder.of(tenant)
            for path in sorted(own.open.glob("*.lock")):
                try:
                    claim = self._claim(own, path)
                except OSError as error:
                    fault = error.strerror
                    self.folder.note_fault("batch_unreadable", path, fault, error=fault)
                    continue
                self.folder.note_sound(path)
                if claim is not None:
                    yield claim

    def sweep(self) -> None:
        """Delete records of batches that ended `KEPT_S` ago, and remains of processes that died."""
        for own in self.folder.tenants:
            for batch_id in _ids(own):
                record = self._load(own, batch_id)
                if record is not None and time.time() - record.ended_at > KEPT_S:
                    _record_path(own, batch_id).unlink(missing_ok=True)
            delete_abandoned(own.batches.glob("*.new"))
            for path in own.open.glob(f"{PREFIX}*"):
                if not path.with_suffix(".lock").exists():
                    path.unlink(missing_ok=True)

    def _check_room(self, own: TenantFolder) -> None:
        """Raise ApiError if the tenant has too many batches, or too many files for results."""
        most = self.folder.limits.num_batches
        if sum(1 for _ in own.open.glob("*.lock")) >= most:
            raise ApiError(
                429, f"this key may have {most} batches under way", code="too_many_batches",
                should_retry=False,
            )  # fmt: skip
        if len(_ids(own)) >= MAX_RECORDS:
            message = f"the server keeps {MAX_RECORDS} batches of a key, each for 30 days"
            raise ApiError(400, message, code="storage_limit_exceeded")
        self.folder.check_room(own, 0)

    def _open(self, own: TenantFolder, record: BatchRecord) -> None:
        """Write the open files and then the record: a batch without a record does not exist.

        Deletes all of them if that fails.
        """
        lock, path = own.open / f"{record.id}.lock", _record_path(own, record.id)
        try:
            lock.touch(mode=0o600)
            os.link(content_path(own, record.input_file_id), lock.with_suffix(".input"))
            sync_folder(own.open)
            write_atomically(path, msgspec.json.encode(record))
        except OSError as error:
            for made in (path, lock.with_suffix(".input"), lock):
                made.unlink(missing_ok=True)
            if isinstance(error, FileNotFoundError):  # the file was deleted since
                raise not_found("file") from None
            raise

    def _load(self, own: TenantFolder, batch_id: str) -> BatchRecord | None:
        return self.folder.read_record(_record_path(own, batch_id), BatchRecord)

    def _claim(self, own: TenantFolder, path: Path) -> BatchClaim | None:
        """Lock a batch, and return its claim; None if it is locked, or has no open record."""
        with ExitStack() as opened:
            try:
                lock = opened.enter_context(path.open("rb"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (FileNotFoundError, BlockingIOError):
                return None
            record = self._load(own, path.stem)
            if record is not None and not record.has_ended:
                opened.pop_all()  # the claim closes it
                return BatchClaim(own, record, lock)
            if record is not None or not _record_path(own, path.stem).exists():
                _close_remains(path, record)  # a damaged record keeps its results
            return None


def _record_path(own: TenantFolder, batch_id: str) -> Path:
    return own.batches / f"{batch_id}.json"


def _ids(own: TenantFolder) -> list[str]:
    return [path.stem for path in own.batches.glob(f"{PREFIX}*.json")]


def _seen(own: TenantFolder, record: BatchRecord) -> BatchRecord:
    """Return a record as clients see it: a cancelled batch is `cancelling` before it has ended."""
    if record.end not in (None, "cancelled") or record.has_ended:
        return record
    try:
        asked_s = (own.open / f"{record.id}.cancel").stat().st_mtime
    except FileNotFoundError:
        return record
    times = {**record.times, "cancelling": int(asked_s)}
    return msgspec.structs.replace(record, status="cancelling", times=times)


def _close_remains(lock: Path, record: BatchRecord | None) -> None:
    """Delete the open files of a batch that has ended, or that never got a record."""
    with suppress(FileNotFoundError):
        if record is not None or time.time() - lock.stat().st_mtime > _LONE_S:
            for part in _PARTS:
                lock.with_suffix(part).unlink(missing_ok=True)


_MAX_UPLOADS = 8  # of one tenant at once, in each process


class Stores:
    """The files and the batches of a data folder. `on_batch` is called after a batch changed."""

    def __init__(self, path: Path, limits: StorageLimits) -> None:
        self.folder = DataFolder(path, limits)
        self.files = FileStore(self.folder)
        self.batches = BatchStore(self.folder)
        self.on_batch: Callable[[], None] = lambda: None
        self._num_uploads: Counter[str] = Counter()

    @contextmanager
    def uploading(self, tenant: str) -> Iterator[None]:
        """Count one upload during the `with` block. Raises ApiError 429 for one too many."""
        if self._num_uploads[tenant] >= _MAX_UPLOADS:
            message = f"this key may have {_MAX_UPLOADS} uploads under way"
            raise ApiError(429, message, code="too_many_uploads", retry_after_s=1.0)
        self._num_uploads[tenant] += 1
        try:
            yield
        finally:
            self._num_uploads[tenant] -= 1
