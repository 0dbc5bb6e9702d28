"""Folders without a model, or with a damaged one: each is refused before loading, with a fix."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sagellm.graphs.models import UnsupportedModel
from sagellm.runtime.models.folder import BUILT_IN, ModelError, resolve_model

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1073741824\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of sage-tiny, for a test to damage."""
    return Path(shutil.copytree(BUILT_IN["sage-tiny"], tmp_path / "model"))


def config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensors(folder: Path, **changes: object) -> None:
    """Change tensors by name; None removes one."""
    held = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: held[name] for name in held if held[name] is not None}, folder / WEIGHTS)


def narrower(folder: Path) -> None:
    norm = load_file(folder / WEIGHTS)["model.norm.weight"]
    tensors(folder, **{"model.norm.weight": norm[:-1]})


def truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1000])


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def gguf(folder: Path) -> None:
    emptied(folder)
    (folder / "model-q4.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def sentencepiece(folder: Path) -> None:
    (folder / TOKENIZER).rename(folder / "tokenizer.model")


def sharded(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    (folder / names[0]).write_bytes(b"")


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "weights are an LFS pointer": (
        lambda folder: (folder / WEIGHTS).write_bytes(LFS),
        f"{WEIGHTS} is a Git LFS pointer to 1.07 GB, not the file",
        "git lfs pull",
    ),
    "tokenizer is an LFS pointer": (
        lambda folder: (folder / TOKENIZER).write_bytes(LFS),
        f"{TOKENIZER} is a Git LFS pointer",
        "git lfs pull",
    ),
    "config is an LFS pointer": (
        lambda folder: (folder / CONFIG).write_bytes(LFS),
        f"{CONFIG} is a Git LFS pointer",
        "git lfs pull",
    ),
    "config is a web page": (
        lambda folder: (folder / CONFIG).write_text("<!doctype html><p>log in"),
        f"{CONFIG} is a web page",
        "download it again",
    ),
    "config is no JSON": (
        lambda folder: (folder / CONFIG).write_text("{"),
        "is not valid JSON",
        "download it again",
    ),
    "empty": (emptied, "is empty", "config.json, tokenizer.json and *.safetensors"),
    "GGUF": (gguf, "holds a GGUF file (model-q4.gguf)", "Hugging Face folder"),
    "only pickles": (pickled, "only pickled weights (pytorch_model.bin)", "save_pretrained"),
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        f"{WEIGHTS} is missing",
        "download it",
    ),
    "missing shards": (sharded, "model-00002-of-00002.safetensors, which is missing", "download"),
    "no tokenizer": (
        lambda folder: (folder / TOKENIZER).unlink(),
        f"{TOKENIZER} is missing",
        "copy it from the model",
    ),
    "tokenizer.model alone": (sentencepiece, "tokenizer.model is there", "AutoTokenizer"),
    "truncated": (truncated, f"{WEIGHTS} is cut off: it has", "download it again"),
    "no safetensors file": (
        lambda folder: (folder / WEIGHTS).write_bytes(b"hello world, hello"),
        "has no safetensors header",
        "download it again",
    ),
    "a tensor is missing": (
        lambda folder: tensors(folder, **{"model.norm.weight": None}),
        "tensor model.norm.weight is missing",
        "config.json that these weights were saved with",
    ),
    "a tensor has another shape": (
        narrower,
        "tensor model.norm.weight is [",
        "config.json that these weights were saved with",
    ),
    "quantised by its settings alone": (
        lambda folder: config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        "stored as gptq of 4 bits (quantization_config), and no tensor is",
        "remove quantization_config",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_with_cause_and_fix(folder: Path, name: str) -> None:
    damage, cause, fix = DAMAGE[name]
    damage(folder)
    with pytest.raises(ModelError) as refused:
        resolve_model(str(folder))
    assert cause in refused.value.cause
    assert fix in refused.value.fix


def test_the_copy_that_is_not_damaged_is_taken(folder: Path) -> None:
    assert resolve_model(str(folder)).path == folder


def test_a_file_is_refused_with_its_folder(folder: Path) -> None:
    with pytest.raises(ModelError) as refused:
        resolve_model(str(folder / WEIGHTS))
    assert refused.value.fix == f"give the folder that it is in: {folder}"


def test_an_architecture_that_is_not_built_is_named_with_the_list_of_what_is(folder: Path) -> None:
    config(folder, architectures=["T5Model"])
    with pytest.raises(UnsupportedModel) as refused:
        resolve_model(str(folder))
    assert refused.value.cause == "architecture T5Model is not built into sagellm"
    assert "LlamaForCausalLM" in refused.value.fix
    assert "did you mean" not in str(refused.value)
    assert refused.value.file == str(folder / CONFIG)
