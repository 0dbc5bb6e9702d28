"""Pages of mapped files are dropped, and no other pages."""

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sagellm.runtime.models.stored_weights import drop_pages

SIZE = 64 << 20  # bytes


def resident():
    return psutil.Process().memory_info().rss


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model with a name.safetensors"
    numbers = torch.arange(SIZE // 8).unsqueeze(0)
    save_file({"a": numbers, "b": numbers + 1}, path)
    return path


def test_pages_of_a_file_are_given_back_and_come_again(file):
    with safe_open(str(file), framework="pt") as opened:
        tensor = opened.get_tensor("a")
    total = tensor.sum()
    before = resident()
    drop_pages([file])
    assert before - resident() > 0.9 * SIZE
    assert tensor.sum() == total


def test_other_files_and_other_memory_are_left_alone(file, tmp_path):
    with safe_open(str(file), framework="pt") as opened:
        mapped = opened.get_tensor("a")
    held = torch.ones(SIZE // 4)
    total, before = mapped.sum(), resident()
    drop_pages([tmp_path / "another.safetensors"])
    assert abs(before - resident()) < 0.1 * SIZE
    drop_pages([file])
    assert held.sum() == SIZE // 4
    assert mapped.sum() == total


def test_a_system_without_maps_keeps_all(file, monkeypatch, tmp_path):
    monkeypatch.setattr("sagellm.runtime.models.stored_weights._MAPS", tmp_path / "none")
    with safe_open(str(file), framework="pt") as opened:
        tensor = opened.get_tensor("a")
    total, before = tensor.sum(), resident()
    drop_pages([file])
    assert before - resident() < 0.1 * SIZE
    assert tensor.sum() == total
