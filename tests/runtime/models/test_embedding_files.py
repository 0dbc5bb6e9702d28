"""How a folder says how its model embeds, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from embedding_models import make_embedder, write_modules
from safetensors.numpy import load_file, save_file

from sagellm.graphs.models import UnsupportedModel
from sagellm.runtime.models import ModelError
from sagellm.runtime.models.embedding_files import HeadOptions
from sagellm.runtime.models.folder import ModelFolder, resolve_model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_embedder("bert", tmp_path_factory.mktemp("bert"), modules=False)


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def opened(folder: Path, **given: Any) -> ModelFolder:
    return resolve_model(str(folder), HeadOptions(**given))


def write(file: Path, value: object) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_modules_say_pooling_and_scale(folder: Path, pooling: str, normalize: bool) -> None:
    write_modules(folder, pooling, normalize=normalize)
    head = opened(folder).head
    assert head is not None
    assert (head.pooling, head.is_unit) == (pooling, normalize)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
    ],
)
def test_both_spellings_of_pooling_are_read(folder: Path, config: object, pooling: str) -> None:
    write_modules(folder, "cls")
    write(folder / "1_Pooling" / "config.json", config)
    head = opened(folder).head
    assert head is not None
    assert head.pooling == pooling


def test_an_option_wins_over_the_folder(folder: Path) -> None:
    write_modules(folder, "cls")
    head = opened(folder, pooling="mean", normalize=False).head
    assert head is not None
    assert (head.pooling, head.is_unit) == ("mean", False)


def test_a_folder_that_does_not_say_how_it_pools_needs_the_option(folder: Path) -> None:
    with pytest.raises(ModelError, match="how its rows are pooled") as caught:
        opened(folder)
    assert "cls, mean, last" in caught.value.fix
    head = opened(folder, pooling="cls").head
    assert head is not None
    assert head.is_unit


@pytest.mark.parametrize(
    ("file", "value", "says"),
    [
        ("modules.json", [{"type": "x.Dense", "path": "2_Dense"}], "a step Dense"),
        ("modules.json", [{"type": "x.Transformer", "path": "0_BERT"}], "in a subfolder"),
        ("modules.json", [{"type": "x.Pooling", "path": "../secret"}], "no subfolder"),
        ("modules.json", {"type": "x.Pooling"}, "no list of modules"),
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "pools by max"),
        ("1_Pooling/config.json", {}, "pools by nothing"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "pools by cls and mean",
        ),
    ],
)
def test_steps_that_are_not_built_are_refused(
    folder: Path, file: str, value: object, says: str
) -> None:
    write_modules(folder, "cls")
    write(folder / file, value)
    with pytest.raises(ModelError, match=says):
        opened(folder)


def test_the_longest_text_is_that_of_sentence_transformers(folder: Path) -> None:
    write_modules(folder, "cls")
    assert opened(folder).facts.max_model_len == 130
    write(folder / "sentence_bert_config.json", {"max_seq_length": 64})
    assert opened(folder).facts.max_model_len == 64
    write(folder / "sentence_bert_config.json", {"max_seq_length": 4096})
    assert opened(folder).facts.max_model_len == 130


def test_weights_may_have_the_prefix_of_a_larger_model(folder: Path) -> None:
    write_modules(folder, "cls")
    file = folder / "model.safetensors"
    weights = {f"bert.{name}": array for name, array in load_file(file).items()}
    save_file(weights, file)
    head = opened(folder).head
    assert head is not None
    assert head.prefix == "bert."


def test_a_missing_weight_is_named(folder: Path) -> None:
    write_modules(folder, "cls")
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.1.output.dense.bias"]
    save_file(weights, file)
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\.output\.dense\.bias is missing"):
        opened(folder)


def test_pooling_changes_the_hash_of_the_model(folder: Path) -> None:
    first, second = (opened(folder, pooling=pooling) for pooling in ("cls", "mean"))
    assert first.hash != second.hash


def test_an_encoder_is_not_opened_to_generate(folder: Path) -> None:
    write_modules(folder, "cls")
    with pytest.raises(UnsupportedModel, match="kind: embedding"):
        resolve_model(str(folder))


def test_heads_of_other_tasks_are_no_reason_for_a_warning(folder: Path) -> None:
    write_modules(folder, "cls")
    file = folder / "model.safetensors"
    weights = load_file(file)
    bias = weights["embeddings.LayerNorm.bias"]
    save_file({**weights, "pooler.dense.bias": bias, "cls.predictions.bias": bias}, file)
    assert opened(folder).warnings == ()
