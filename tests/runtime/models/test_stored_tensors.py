"""Tensors that an architecture does not read: accepted, warned of, or refused."""

import json
from pathlib import Path

import pytest
import torch
from models_on_the_fly import FAMILIES, SMALL, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sagellm.cli import main
from sagellm.runtime.models import fit
from sagellm.runtime.models.files import StoredTensor
from sagellm.runtime.models.folder import ModelError, resolve_model

WEIGHTS = "model.safetensors"
ONE = torch.ones(1)
LAYER = "model.layers.1."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama3", tmp_path_factory.mktemp("llama3"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A tied model, for a test to add to."""
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def add(folder: Path, **tensors: torch.Tensor) -> None:
    save_file({**load_file(folder / WEIGHTS), **tensors}, folder / WEIGHTS)


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_taken_whole_and_in_shards(
    family: str, is_tied: bool, tmp_path: Path
) -> None:
    folder = make_model(family, tmp_path / "whole", tie_word_embeddings=is_tied)
    whole = resolve_model(str(folder))
    assert (whole.facts.tie_embeddings, whole.warnings) == (is_tied, ())
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / WEIGHTS).unlink()
    sharded = resolve_model(str(folder))
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert (sharded.facts.tie_embeddings, sharded.warnings) == (is_tied, ())


@pytest.mark.parametrize(
    "name",
    [
        *("model.rotary_emb.inv_freq", f"{LAYER}self_attn.rotary_emb.inv_freq"),
        *("model.layers.1.self_attn.rotary_emb.cos_cached", f"{LAYER}attn.masked_bias"),
        *(f"{LAYER}self_attn.masked_bias", "position_ids", "model.embeddings.position_ids"),
        *(f"{LAYER}self_attn.k_proj.k_scale", f"{LAYER}self_attn.v_proj.v_scale"),
        *("embed_tokens.weight", "model.decoder.embed_tokens.weight", "score.weight"),
        *("v_head.summary.weight", "vision_tower.blocks.0.weight", "model.visual.norm.weight"),
        *("multi_modal_projector.weight", "mtp.layers.0.weight", "model.mtp_block.weight"),
    ],
)
def test_what_is_known_to_be_harmless_is_taken_silently(name: str, folder: Path) -> None:
    add(folder, **{name: ONE})
    assert resolve_model(str(folder)).warnings == ()


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["something.weight"], "something.weight"),
        (["model.side.weight", "model.side.bias"], "model.side.bias, model.side.weight"),
        ([f"{LAYER}self_attn.cache"], f"{LAYER}self_attn.cache"),
        ([f"x{number}" for number in range(5)], "x0, x1, x2 and 2 more"),
    ],
)
def test_what_is_not_known_is_named_in_one_warning(
    names: list[str], shown: str, folder: Path
) -> None:
    add(folder, **{name: ONE.clone() for name in names})
    (warning,) = resolve_model(str(folder)).warnings
    assert warning.cause == f"this architecture does not read {shown}"


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        (f"{LAYER}self_attn.q_proj.bias", "has no place in this architecture"),
        (f"{LAYER}mlp.down_proj.bias", "has no place in this architecture"),
        (f"{LAYER}self_attn.q_norm.weight", "has no place in this architecture"),
        (f"{LAYER}mlp.up_proj.weight_scale", "has no place in this architecture"),
        (f"{LAYER}mlp.up_proj.weight_scale_inv", "has no place in this architecture"),
        (f"{LAYER}mlp.up_proj.weight.absmax", "has no place in this architecture"),
        (f"{LAYER}mlp.up_proj.lora_A.weight", "has no place in this architecture"),
        ("model.norm.bias", "has no place in this architecture"),
        ("lm_head.bias", "has no place in this architecture"),
        ("model.embed_tokens.weight_scale", "has no place in this architecture"),
        ("model.layers.2.mlp.up_proj.weight", "config.json has 2 layers"),
    ],
)
def test_what_the_result_depends_on_is_refused(name: str, cause: str, folder: Path) -> None:
    add(folder, **{name: ONE})
    with pytest.raises(ModelError) as refused:
        resolve_model(str(folder))
    assert f"tensor {name}" in refused.value.cause
    assert cause in refused.value.cause
    assert refused.value.fix


def test_all_further_layers_are_one_mistake(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 1}))
    with pytest.raises(ModelError, match="is of a further layer") as refused:
        resolve_model(str(folder))
    assert "\n" not in refused.value.cause


def test_tensors_are_compared_whole(tmp_path: Path) -> None:
    """One byte differs, at any place."""
    stored = [StoredTensor("U8", (5_000_001,), name, 0, 5_000_001) for name in ("a", "b")]
    (tmp_path / "a").write_bytes(bytes(5_000_001))
    for place in (0, 70_000, 1 << 20, 5_000_000):
        changed = bytearray(5_000_001)
        changed[place] = 1
        (tmp_path / "b").write_bytes(changed)
        assert not fit._is_same(tmp_path, *stored)
    assert fit._is_same(tmp_path, stored[0], stored[0])


def test_a_second_copy_of_tied_embeddings_is_taken_silently(folder: Path) -> None:
    add(folder, **{"lm_head.weight": load_file(folder / WEIGHTS)["model.embed_tokens.weight"]})
    found = resolve_model(str(folder))
    assert (found.facts.tie_embeddings, found.warnings) == (True, ())


@pytest.mark.parametrize("row", [0, SMALL["vocab_size"] - 1])
def test_a_head_that_differs_from_tied_embeddings_is_used_as_transformers_does(
    row: int, folder: Path
) -> None:
    head = load_file(folder / WEIGHTS)["model.embed_tokens.weight"].clone()
    head[row] += 1
    add(folder, **{"lm_head.weight": head})
    found = resolve_model(str(folder))
    assert not found.facts.tie_embeddings
    assert [warning.event for warning in found.warnings] == ["model_not_tied"]


@pytest.mark.parametrize(
    "options",
    [("pd", "--model", "FOLDER"), ("FOLDER",), ("MADE", "--set", "g.draft_model=FOLDER")],
    ids=["two engines", "a model", "a draft model"],
)
def test_a_warning_is_one_line_however_many_engines_have_the_model(
    options: tuple[str, ...], made: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(folder, **{"something.weight": ONE})
    named = [one.replace("FOLDER", str(folder)).replace("MADE", str(made)) for one in options]
    draft = ["--set", "g.speculation=draft"] if "MADE" in options else []
    assert main(["graph", "check", *named, *draft]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    said = json.loads(line)
    assert (said["event"], said["level"]) == ("model_tensors_unread", "warning")
    assert said["cause"] == "this architecture does not read something.weight"
