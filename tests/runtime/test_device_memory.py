"""Only a backend touches the memory of its device: it owns and copies all tensors."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOUCHES = re.compile(r"\.numpy\(\)|\.tolist\(\)|\.item\(\)|\.data_ptr\(\)|torch\.from_numpy")
FLOORS = ("graphs", "runtime", "operators", "sagellm")
# Weights are read from files on the host, before they are on a device.
ON_THE_HOST = ("runtime/models/",)


def sources() -> list[Path]:
    found = [path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]
    linked = {f"sagellm/{name}" for name in ("backends", "graphs", "operators", "runtime")}
    names = [path for path in found if "/".join(path.relative_to(ROOT).parts[:2]) not in linked]
    return [path for path in names if not str(path.relative_to(ROOT)).startswith(ON_THE_HOST)]


def test_only_backends_touch_tensors() -> None:
    touching = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if TOUCHES.search(line)
    ]
    assert touching == []


@pytest.mark.parametrize("folder", ["runtime/engine", "runtime/kv"])
def test_engines_and_transfers_import_no_torch(folder: str) -> None:
    importing = [
        path.name
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(import|from) torch", path.read_text(), re.MULTILINE)
    ]
    assert importing == []


def test_what_touches_a_tensor_is_found() -> None:
    for line in ("a.numpy()[0]", "ids.tolist()", "x.item()", "torch.from_numpy(array)"):
        assert TOUCHES.search(line)
    assert sum("engine" in str(path) for path in sources()) > 20
