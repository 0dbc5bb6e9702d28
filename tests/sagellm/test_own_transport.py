"""A user's transport: installed as a package, it moves the blocks of worker processes."""

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from process_streams import GREEDY, opened, stream_all

import sagellm
from sagellm.extensions import import_named
from sagellm.graphs.diagnostics import GraphError
from sagellm.runtime.kv.transports import TRANSPORTS, TransportKind

ROOT = Path(__file__).parent.parent.parent
ENTRY_POINT = "[sagellm.transports]\nfile = packaged_transport\n"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example as an installed package; the folder of its files."""
    info = tmp_path / "own_transport-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-transport\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINT)
    (tmp_path / "packaged_transport.py").write_text(
        (ROOT / "examples/own_transport.py").read_text()
    )
    (tmp_path / "files").mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield tmp_path / "files"
    TRANSPORTS._loaded.pop("file", None)
    sys.modules.pop("packaged_transport", None)


@pytest.fixture
def registered() -> Iterator[None]:
    example = import_named("own_transport.py", ROOT / "examples")
    sagellm.register_transport("file", example.TRANSPORT)
    yield
    del TRANSPORTS._registered["file"]


def changes(folder: Path) -> tuple[int, list[Path]]:
    """When a file last came or went, and the files that are left."""
    return folder.stat().st_mtime_ns, list(folder.glob("kv-*"))


async def test_it_moves_the_blocks_of_workers(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened("pd", "tasks") as session:
        right = await stream_all(session, GREEDY)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(installed))
    before, _ = changes(installed)
    async with opened("pd", **{"executor.kv": "file"}) as session:
        found = await stream_all(session, GREEDY)
    assert found.tokens == right.tokens
    assert set(found.reasons.values()) == {"length"}
    after, left = changes(installed)
    assert after > before
    assert left == []


@pytest.mark.usefixtures("registered")
async def test_workers_do_not_know_what_this_process_registered() -> None:
    with pytest.raises(GraphError, match="worker processes do not know it"):
        async with opened("pd", **{"executor.kv": "file"}):
            pass


@pytest.mark.usefixtures("registered")
def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="'file' exists already"):
        sagellm.register_transport("file", TRANSPORTS["file"])
    with pytest.raises(ValueError, match="as it ships with sagellm"):
        sagellm.register_transport("tcp", TRANSPORTS["file"])


def test_what_is_no_transport_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a TransportKind"):
        sagellm.register_transport("file", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="open must be a function"):
        TransportKind(3)  # type: ignore[arg-type]


async def test_a_broken_package_is_refused(installed: Path) -> None:
    (installed.parent / "packaged_transport.py").write_text("TRANSPORT = 3\n")
    with pytest.raises(GraphError, match="must be a TransportKind"):
        async with opened("pd", **{"executor.kv": "file"}):
            pass


def test_the_docs_name_every_transport() -> None:
    for page in ("operations", "graphs"):
        (row,) = re.findall(
            r"^\| `(?:executor\.)?kv` .*$", (ROOT / f"docs/{page}.md").read_text(), re.M
        )
        named = re.findall(r"`(\w+)`", row.rpartition(" | ")[2])
        assert named == list(TRANSPORTS.ours)
