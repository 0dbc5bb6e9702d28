"""`sagellm model list | download | rm`: the models on this machine."""

import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from sagellm.cli.errors import FAILED, RESOURCES, Failure, suggestion
from sagellm.runtime.models.folder import BUILT_IN, HubError, download
from sagellm.runtime.models.hub_cache import (
    CachedModel,
    cached_models,
    damaged_files,
    remove_cached,
)

_UNITS = ("B", "kB", "MB", "GB", "TB")


def list_(*, json: bool = False) -> int:
    """List the models that need no download: those that ship, and those in the cache.

    Parameters
    ----------
    json
        Print a list of objects: name, bytes, revisions, used, folder; null for what ships.
    """
    shipped: list[dict[str, object]] = [
        {"name": name, "bytes": _size(folder), "revisions": None, "used": None}
        | {"folder": str(folder)}
        for name, folder in BUILT_IN.items()
    ]
    rows = [*shipped, *map(_row, cached_models())]
    if json:
        print(msgspec.json.encode(rows).decode())
        return 0
    table = Table(box=None, pad_edge=False)
    for name in ("name", "size", "used", "folder"):
        table.add_column(name)
    for row in rows:
        used = str(row["used"] or "ships with sagellm")[:10] if row["used"] else "ships"
        table.add_row(str(row["name"]), _shown(row["bytes"]), used, str(row["folder"]))
    Console(soft_wrap=True).print(table)
    return 0


def download_(name: str, /, *, revision: str | None = None) -> int:
    """Download a model from the Hub, go on with a download that broke off, and check it.

    Every file is read again and compared with its checksum. Code and pickles are not downloaded.
    A gated or private model needs HF_TOKEN.

    Parameters
    ----------
    name
        OWNER/NAME, as at the Hub.
    revision
        A branch, a tag or a commit; main unless given.
    """
    if name in BUILT_IN:
        raise Failure(f"{name} ships with sagellm", "use it as it is")
    try:
        folder = download(name, revision)
    except HubError as error:
        raise Failure(f"{name}: {error.cause}", error.fix, code=RESOURCES) from error
    damaged = list(damaged_files(folder))
    for path in damaged:
        path.resolve().unlink()
        path.unlink()
    if damaged:
        names = ", ".join(path.name for path in damaged)
        cause = f"{name}: damaged in the cache, and removed: {names}"
        raise Failure(cause, "run the command again: only these are missing", str(folder), FAILED)
    print(folder)
    return 0


def rm(name: str, /, *, yes: bool = False) -> int:
    """Remove a downloaded model from the cache, with all its revisions.

    Parameters
    ----------
    name
        OWNER/NAME, as `sagellm model list` shows it.
    yes
        Do not ask.
    """
    known = {model.name: model for model in cached_models()}
    if name not in known:
        fix = suggestion(name, known) if known else "nothing was downloaded"
        raise Failure(f"there is no downloaded model {name!r}", fix)
    size = _shown(known[name].num_bytes)
    if not (yes or _agrees(f"remove {name} ({size})?")):
        raise Failure("nothing was removed", "answer y, or give --yes", code=FAILED)
    print(f"removed {name}, {_shown(remove_cached(name))}")
    return 0


def _agrees(question: str) -> bool:
    """Whether the user agrees. Without a terminal nobody can be asked."""
    if not sys.stdin.isatty():
        return False
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _row(model: CachedModel) -> dict[str, object]:
    return {
        "name": model.name,
        "bytes": model.num_bytes,
        "revisions": model.num_revisions,
        "used": datetime.fromtimestamp(model.used_s, UTC).isoformat(timespec="seconds"),
        "folder": str(model.folder),
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _shown(num_bytes: object) -> str:
    assert isinstance(num_bytes, int)
    size, number = float(num_bytes), 0
    while size >= 1000 and number < len(_UNITS) - 1:
        size, number = size / 1000, number + 1
    return f"{size:.0f} {_UNITS[number]}" if number == 0 else f"{size:.1f} {_UNITS[number]}"
