"""The folder of `--data-dir`: where files and batches lie, atomic writes, locks, and limits.

    DATA_DIR/server.lock                            held by the one server that uses the folder
    DATA_DIR/lock                                   held while a limit is checked and a name is made
    DATA_DIR/TENANT/files/file-ID.json, .data       a file: its record, and its bytes
    DATA_DIR/TENANT/batches/batch_ID.json           the record of a batch
    DATA_DIR/TENANT/open/batch_ID.*                 of a batch that has not ended: see `BatchStore`

TENANT is a hash of the tenant's name. All functions block, so the loop calls them in threads.
"""

import errno
import fcntl
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from hashlib import blake2b
from math import inf
from pathlib import Path
from threading import Lock
from typing import IO, Literal, ParamSpec, TypeVar

import anyio
import anyio.to_thread
import msgspec

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.settings import StorageLimits
from sagellm.graphs.log import get_logger

LOG = get_logger("sagellm.gateway")

P = ParamSpec("P")
T = TypeVar("T")

_MODE, _FILE_MODE = 0o700, 0o600  # other users must not read prompts, and not hold the lock
_NUM_THREADS = 8  # a slow disk must not take the threads of other work
_SIZES_S = 2.0  # how long sizes are kept: each batch at work looks for room
_TENANT_BYTES = 16
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ID = re.compile(r"(file-|batch_)[0-9a-f]{32}")


def make_data_folder(path: Path) -> None:
    """Make the folder if it is missing, and try a file lock and a hard link. Raises OSError."""
    path.mkdir(mode=_MODE, parents=True, exist_ok=True)
    probe = path / f"probe-{secrets.token_hex(8)}"
    linked = probe.with_suffix(".link")
    try:
        with probe.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.link(probe, linked)
    finally:
        for made in (probe, linked):
            made.unlink(missing_ok=True)


class FolderInUse(Exception):
    """Another server holds the data folder. The message says which server, as far as is known."""


@contextmanager
def held_data_folder(path: Path) -> Iterator[None]:
    """Make a data folder, and hold it for this server during the `with` block.

    Only the process that the user starts calls this. Its gateway processes share the folder. The
    kernel frees the lock when that process ends, also after kill -9: child processes do not inherit
    open files. Raises FolderInUse if a server holds the folder, and OSError if it cannot be used.
    """
    make_data_folder(path)
    lock = path / "server.lock"
    with open_private(lock, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUse(lock.read_text(errors="replace") or "another process") from None
        with suppress(OSError):  # a full disk must not keep a server from its batches
            os.ftruncate(file.fileno(), 0)
            # With the host, because containers that share a volume may have equal process ids.
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def new_id(prefix: str) -> str:
    """Return an id that no one can guess. Ids sort by the time at which they were made."""
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(8)}"


def is_id(text: str, prefix: str) -> bool:
    """Whether a client's text is the form of an id, so that it may become the name of a file."""
    return text.startswith(prefix) and _ID.fullmatch(text) is not None


def ids_after(ids: Iterable[str], after: str, *, newest_first: bool) -> list[str]:
    """Return the ids in the order of a list, without those up to the id `after` ("": all)."""
    found = sorted(ids, reverse=newest_first)
    if not after:
        return found
    return [each for each in found if (each < after if newest_first else each > after)]


def open_private(path: Path, mode: Literal["xb", "ab"], *, buffering: int = -1) -> IO[bytes]:
    """Open a file to write. Only the user of this process may read a file that is made."""

    def opened(name: str, flags: int) -> int:
        return os.open(name, flags, _FILE_MODE)

    return open(path, mode, buffering, opener=opened)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file. After a crash at any time it has the old or the new content, whole."""
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        with open_private(new, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def telling_full_disk() -> Iterator[None]:
    """Raise ApiError 507 if the block finds the disk full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        message = "the server's disk is full; nothing was stored"
    else:
        return
    raise ApiError(507, message, code="storage_full", should_retry=False)


class TenantFolder:
    """The folders of one tenant. They are made at the first use of `make`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = path / "files"
        self.batches = path / "batches"
        self.open = path / "open"

    def make(self) -> None:
        for folder in (self.path, self.files, self.batches, self.open):
            folder.mkdir(mode=_MODE, exist_ok=True)  # one by one: parents would get another mode

    @property
    def num_files(self) -> int:
        return sum(name.endswith((".data", ".part")) for name in _names(self.files))

    @property
    def num_bytes(self) -> int:
        """The bytes of all files and results. A file with several names counts once."""
        return sum(_sizes(self.files)) + sum(_sizes(self.open))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _sizes(folder: Path) -> Iterator[int]:
    """Yield each file's share of its bytes: the bytes by the number of its names."""
    for name in _names(folder):
        with suppress(FileNotFoundError):  # deleted since
            stat = os.stat(folder / name)
            yield stat.st_size // max(1, stat.st_nlink)


class DataFolder:
    """The folder of all tenants. All gateway processes of one server may use it at once."""

    def __init__(self, path: Path, limits: StorageLimits) -> None:
        self.path = path
        self.limits = limits
        self._sizing = Lock()
        self._sizes: dict[Path, tuple[float, int]] = {}  # time and bytes, by the tenant's folder
        self._faults: dict[Path, object] = {}  # what was logged of a path, until it is sound again

    # Made at the first use: the owner may be built on another loop than it runs on.
    @cached_property
    def _threads(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(_NUM_THREADS)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run blocking work in a thread. A cancellation waits for the end of the work."""
        return await anyio.to_thread.run_sync(partial(work, *args, **kwargs), limiter=self._threads)

    def of(self, tenant: str) -> TenantFolder:
        # A hash, because an operator may name a tenant with any characters.
        named = blake2b(tenant.encode(errors="surrogatepass"), digest_size=_TENANT_BYTES)
        return TenantFolder(self.path / named.hexdigest())

    @property
    def tenants(self) -> list[TenantFolder]:
        """The folders of all tenants that have stored something."""
        return [TenantFolder(self.path / name) for name in _names(self.path) if len(name) == 32]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder, which all processes share, during the `with` block."""
        with open_private(self.path / "lock", "ab") as file:  # closing it frees the lock
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def read_record(self, path: Path, kind: type[T]) -> T | None:
        """Return the record at a path; None if there is none, or if the disk has damaged it.

        A damaged record is logged once, and again after its content has changed. Raises OSError.
        """
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            self.note_sound(path)
            return None
        try:
            record = msgspec.json.decode(content, type=kind)
        except ValueError:
            self.note_fault("record_damaged", path, hash(content))
            return None
        self.note_sound(path)
        return record

    def note_fault(self, event: str, path: Path, state: object, **fields: object) -> None:
        """Log a fault of a path, unless the last fault of that path had an equal `state`."""
        if self._faults.get(path) != state:
            self._faults[path] = state
            LOG.warning(event, path=str(path), **fields)

    def note_sound(self, path: Path) -> None:
        """Forget the fault of a path, so that it is logged if it comes again."""
        self._faults.pop(path, None)

    def check_room(self, folder: TenantFolder, num_bytes: int) -> None:
        """Raise ApiError if `num_bytes` more would exceed a limit. The lock must be held."""
        limits = self.limits
        if folder.num_files >= limits.num_files:
            raise _limited(f"this key may have {limits.num_files} files")
        if folder.num_bytes + num_bytes > limits.files_bytes:
            raise _limited(f"the files of this key may have {limits.files_bytes} bytes")
        if sum(each.num_bytes for each in self.tenants) + num_bytes > limits.all_files_bytes:
            message = "the server holds as many bytes of files as it may"
            raise ApiError(507, message, code="storage_full", should_retry=False)

    def has_room(self, folder: TenantFolder) -> bool:
        """Whether the bytes of a tenant and of all tenants are within their limits.

        Sizes may be `_SIZES_S` old.
        """
        with self._sizing:
            total = sum(map(self._recent_size, self.tenants))
            is_within = self._recent_size(folder) <= self.limits.files_bytes
        return is_within and total <= self.limits.all_files_bytes

    def _recent_size(self, folder: TenantFolder) -> int:
        since_s, num_bytes = self._sizes.get(folder.path, (-inf, 0))
        if time.monotonic() - since_s >= _SIZES_S:
            num_bytes = folder.num_bytes
            self._sizes[folder.path] = time.monotonic(), num_bytes
        return num_bytes


def _limited(message: str) -> ApiError:
    return ApiError(400, f"{message}; delete some", code="storage_limit_exceeded")
