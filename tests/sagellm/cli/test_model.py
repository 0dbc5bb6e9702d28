"""`sagellm model`: downloads from a Hub that breaks off, checksums, and the cache."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_hub import Hub, small_hub

WEIGHTS = bytes(range(256)) * 4096
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "modeling.py": b"print('never')",
    "pytorch_model.bin": b"pickle",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with small_hub(dict(FILES)) as found:
        yield found


class Command:
    """Runs the command in a process of its own, with a cache of its own and a Hub of the test."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.home = home
        settings = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        self.environment = {**os.environ, **settings, "HF_HUB_OFFLINE": "0"}
        self.err = ""

    def __call__(self, *args: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "sagellm", "model", *args],
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        self.err = done.stderr
        return done.stdout.strip()


@pytest.fixture
def model(hub: Hub, tmp_path: Path) -> Command:
    return Command(hub, tmp_path)


def test_a_model_is_downloaded_listed_and_removed(model: Command, hub: Hub) -> None:
    folder = Path(model("download", "owner/name"))
    assert sorted(each.name for each in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    shipped, cached = json.loads(model("list", "--json"))
    assert (shipped["name"], shipped["revisions"]) == ("sage-tiny", None)
    assert (cached["name"], cached["revisions"], cached["folder"]) == (
        "owner/name",
        1,
        str(folder),
    )
    assert cached["bytes"] == sum(len(FILES[each.name]) for each in folder.iterdir())
    assert "owner/name" in model("list")
    num_downloads = len(hub.asked)
    assert model("download", "owner/name") == str(folder)
    assert len(hub.asked) == num_downloads
    assert "removed owner/name, 1.0 MB" in model("rm", "owner/name", "--yes")
    assert len(json.loads(model("list", "--json"))) == 1


def test_a_download_that_broke_off_goes_on(model: Command, hub: Hub) -> None:
    hub.files["model.safetensors"] = WEIGHTS * 24  # the Hub's client writes pieces of 10 MiB
    hub.cut_at = 21 << 20
    folder = Path(model("download", "owner/name"))
    asked = [ranged for name, ranged in hub.asked if name == "model.safetensors"]
    assert asked[0] is None
    assert asked[1:] == [f"bytes={20 << 20}-"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS * 24


def test_a_damaged_file_is_found_removed_and_fetched_again(model: Command, hub: Hub) -> None:
    folder = Path(model("download", "owner/name"))
    stored = (folder / "model.safetensors").resolve()
    stored.write_bytes(WEIGHTS[:-1] + b"x")
    model("download", "owner/name", code=1)
    assert "damaged in the cache, and removed: model.safetensors" in model.err
    model("download", "owner/name")
    assert stored.read_bytes() == WEIGHTS


def test_what_the_hub_does_not_have_is_named(model: Command) -> None:
    model("download", "owner/other", code=3)
    assert "owner/other: the Hub has no such model" in model.err


def test_a_shipped_model_needs_no_download(model: Command) -> None:
    model("download", "sage-tiny", code=2)
    assert "ships with sagellm" in model.err


def test_nothing_is_removed_without_an_answer(model: Command) -> None:
    model("download", "owner/name")
    model("rm", "owner/name", code=1)
    assert "give --yes" in model.err
    model("rm", "owner/nam", "--yes", code=2)
    assert "did you mean owner/name?" in model.err
    assert "owner/name" in model("list")
