"""Weights: lazy, over one or many files, and complete before anything is computed."""

import json
import os

import numpy as np
import pytest
import torch
from models_on_the_fly import make_model
from safetensors.torch import load_file, save_file

from sagellm.backends.arrays import dtype_name
from sagellm.graphs.models import build
from sagellm.runtime.engine import device_resources
from sagellm.runtime.engine.kinds.local import open_engine
from sagellm.runtime.engine.options import EngineOptions
from sagellm.runtime.models import stored_weights as module
from sagellm.runtime.models.folder import SHARD_INDEX, ModelError, resolve_model
from sagellm.runtime.models.stored_weights import SafetensorsWeights, weight_names


@pytest.fixture
def model(tmp_path):
    return make_model("qwen2", tmp_path)


def split(model):
    """Cut the one file into two shards with an index."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    (model / "model.safetensors").unlink()
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, model / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (model / SHARD_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_one_file(model):
    weights, right = (
        SafetensorsWeights(resolve_model(str(model))),
        load_file(model / "model.safetensors"),
    )
    assert set(weights) == set(right)
    assert len(weights) == len(right)
    assert all(np.array_equal(weights[name], tensor) for name, tensor in right.items())


def test_many_files(model):
    right = split(model)
    weights = SafetensorsWeights(resolve_model(str(model)))
    assert all(np.array_equal(weights[name], tensor) for name, tensor in right.items())


def test_a_shard_that_lacks_a_promised_tensor(model):
    split(model)
    index = json.loads((model / SHARD_INDEX).read_text())
    index["weight_map"]["model.extra"] = "two.safetensors"
    (model / SHARD_INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"two\.safetensors lacks tensor model\.extra"):
        SafetensorsWeights(resolve_model(str(model)))


def test_a_damaged_file_is_named(model):
    (model / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        SafetensorsWeights(resolve_model(str(model)))


def test_a_missing_tensor_is_named_before_anything_is_lowered(model, monkeypatch):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_projj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, model / "model.safetensors")
    monkeypatch.setattr(
        SafetensorsWeights, "__getitem__", lambda self, name: pytest.fail("a weight was read")
    )
    with pytest.raises(ModelError, match=r"up_proj\.weight is missing; the nearest"):
        open_engine(EngineOptions(model=str(model)), name="e")


def test_the_graph_names_every_tensor_of_the_folder(model):
    folder = resolve_model(str(model))
    assert set(weight_names(build(folder.config))) == set(SafetensorsWeights(folder))


def test_the_null_model_has_no_weights():
    with pytest.raises(ModelError, match="has no weights"):
        SafetensorsWeights(resolve_model("null"))


def test_asking_for_a_name_reads_nothing(model, monkeypatch):
    weights = SafetensorsWeights(resolve_model(str(model)))
    monkeypatch.setattr(
        SafetensorsWeights, "__getitem__", lambda self, name: pytest.fail(f"read {name}")
    )
    assert "model.norm.weight" in weights
    assert "model.norm.bias" not in weights


def dropped(monkeypatch):
    """The sizes of the maps of each call of `drop_pages` from now on."""
    given = []
    monkeypatch.setattr(module, "drop_pages", lambda maps: given.append([*map(len, maps)]))
    return given


def test_what_was_read_is_given_back_every_now_and_then(model, monkeypatch):
    given = dropped(monkeypatch)
    monkeypatch.setattr(module, "_HELD_BYTES", 1 << 20)
    weights = SafetensorsWeights(resolve_model(str(model)))
    held = [weights[name] for _ in range(20) for name in weights]
    read = sum(tensor.nbytes for tensor in held)
    assert read // (2 << 20) <= len(given) <= read // (1 << 20)
    assert given[0] == [(model / "model.safetensors").stat().st_size]


def test_a_loaded_engine_has_given_all_back(model, monkeypatch):
    given = dropped(monkeypatch)
    open_engine(EngineOptions(model=str(model)), name="e")
    assert given == [[(model / "model.safetensors").stat().st_size]]


def test_what_is_read_is_told_and_never_more_than_all(model, monkeypatch):
    monkeypatch.setattr(module, "_HELD_BYTES", 1)
    total = (model / "model.safetensors").stat().st_size
    told = []
    weights = SafetensorsWeights(resolve_model(str(model)), told.append)
    for name in [*weights, *weights]:  # some are read twice
        weights[name]
    read = [event.num_bytes for event in told]
    assert read == sorted(read)
    assert read[0] > 0
    assert {event.total_bytes for event in told} == {total}
    assert max(read) < total
    weights.loaded()
    assert (told[-1].num_bytes, told[-1].model) == (total, str(model))


def test_an_engine_tells_how_far_its_start_is(model):
    told = []
    open_engine(EngineOptions(model=str(model)), name="e", progress=told.append)
    assert told[-1].num_bytes == told[-1].total_bytes


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *((kind, str(kind).removeprefix("torch.")) for kind in (torch.float32, torch.float16)),
        *((kind, str(kind).removeprefix("torch.")) for kind in (torch.int8, torch.int32)),
        (torch.bfloat16, "bfloat16"),
        (torch.float8_e4m3fn, "float8_e4m3fn"),
        (torch.float8_e5m2, "float8_e5m2"),
    ],
)
def test_every_dtype_keeps_its_name_and_its_bytes(model, dtype, name):
    tensor = torch.arange(6).view(2, 3).to(dtype)
    folder = resolve_model(str(model))
    save_file({"a": torch.zeros(1), "x": tensor}, model / "model.safetensors")
    found = SafetensorsWeights(folder)["x"]
    assert dtype_name(found.dtype) == name
    assert found.shape == (2, 3)
    assert found.tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_a_dtype_that_is_not_read_is_named(model):
    folder = resolve_model(str(model))
    save_file({"x": torch.zeros(2, dtype=torch.complex64)}, model / "model.safetensors")
    with pytest.raises(ModelError, match="tensor x is stored as C64, which is not read"):
        SafetensorsWeights(folder)["x"]


def test_the_file_of_an_array_holds_its_bytes(model):
    split(model)
    weights = SafetensorsWeights(resolve_model(str(model)))
    for array in weights.values():
        descriptor, offset = weights.file_place(array)
        assert os.pread(descriptor, array.nbytes, offset) == array.tobytes()
        assert weights.file_place(array.copy()) is None


def test_progress_counts_what_is_read_from_files_when_it_is_read(model, monkeypatch):
    monkeypatch.setattr(module, "_HELD_BYTES", 1)
    told = []
    weights = SafetensorsWeights(resolve_model(str(model)), told.append)
    stored = list(weights)[:4]
    for name in stored:
        assert weights.file_place(weights[name])
    for name in stored:  # several may be looked at before their places are asked for
        weights[name]
    assert told == []
    for name in stored:
        weights.file_place(weights[name])
        weights.file_place(weights[name])
    num_bytes = weights[stored[0]].nbytes
    weights.file_place(weights[stored[0]])
    told.clear()
    weights.count_read(0)
    weights.count_read(num_bytes)
    assert told[1].num_bytes - told[0].num_bytes == num_bytes


@pytest.mark.parametrize("content", ["{", '{"model": 7}'])
def test_a_broken_tokenizer_ends_the_loading_with_its_error(model, content):
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        open_engine(EngineOptions(model=str(model)), name="e")


def test_an_error_of_the_weights_does_not_wait_for_the_tokenizer(model, monkeypatch):
    monkeypatch.setattr(device_resources, "load_tokenizer", lambda _: pytest.fail("was read"))
    monkeypatch.setattr(SafetensorsWeights, "require", missing)
    with pytest.raises(ModelError, match="tensor x is missing"):
        open_engine(EngineOptions(model=str(model)), name="e")


def missing(*_):
    raise ModelError("tensor x is missing")
