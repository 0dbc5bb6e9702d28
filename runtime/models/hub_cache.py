"""The cache of downloaded models: listed, checked by checksums, and freed."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

_SHA256, _SHA1 = 64, 40  # hexadecimal digits; large files have the first, others that of git
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One downloaded model. `num_bytes`: of all its revisions. `used_s`: when a file was last read,
    in seconds since the epoch. `folder`: of its newest revision.
    """

    name: str
    num_bytes: int
    num_revisions: int
    used_s: float
    folder: Path


def cached_models() -> list[CachedModel]:
    """The downloaded models, by name. Raises OSError for a cache that cannot be read."""
    return sorted(
        (
            CachedModel(
                repo.repo_id,
                repo.size_on_disk,
                len(repo.revisions),
                repo.last_accessed,
                max(repo.revisions, key=lambda one: one.last_modified).snapshot_path,
            )
            for repo in _repos()
        ),
        key=lambda model: model.name,
    )


def damaged_files(folder: Path) -> Iterator[Path]:
    """The files of a downloaded model whose contents do not have their checksum.

    The cache names each file by the checksum that the Hub gave. Reads every file. Raises OSError.
    """
    for path in sorted(folder.iterdir()):
        stored = path.resolve().name
        if not path.is_file() or len(stored) not in (_SHA256, _SHA1):
            continue
        if _checksum(path, is_sha256=len(stored) == _SHA256) != stored:
            yield path


def remove_cached(name: str) -> int:
    """Remove all revisions of a downloaded model, and return the number of freed bytes.

    Raises LookupError for a model that is not in the cache, and OSError.
    """
    found = next((repo for repo in _repos() if repo.repo_id == name), None)
    if found is None:
        raise LookupError(name)
    revisions = (one.commit_hash for one in found.revisions)
    plan = huggingface_hub.scan_cache_dir().delete_revisions(*revisions)
    plan.execute()
    return int(plan.expected_freed_size)


def _repos() -> Iterator["huggingface_hub.CachedRepoInfo"]:
    """The models with at least one revision."""
    try:
        found = huggingface_hub.scan_cache_dir()
    except huggingface_hub.CacheNotFound:
        return
    yield from (repo for repo in found.repos if repo.repo_type == "model" and repo.revisions)


def _checksum(path: Path, *, is_sha256: bool) -> str:
    digest = hashlib.sha256() if is_sha256 else hashlib.sha1(usedforsecurity=False)
    if not is_sha256:  # as git names a file
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
