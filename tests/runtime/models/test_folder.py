"""Finding a model, and refusing what cannot or must not be loaded, before weights are read."""

import json
import subprocess
import sys

import pytest
from models_on_the_fly import make_model

from sagellm.graphs.models import UnsupportedModel
from sagellm.runtime.models import folder as folders
from sagellm.runtime.models.folder import HubError, ModelError, resolve_model, shard_files


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model(made, tmp_path):
    """A folder of its own, so that a test may damage it."""
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_is_read(model):
    found = resolve_model(str(model))
    assert found.facts.family == "llama"
    assert found.eos_token_ids == (299,)
    assert found.path == model


def test_a_folder_is_checked_once_until_a_file_changes(model, monkeypatch):
    monkeypatch.setattr(folders, "_SETTLED_S", -1.0)
    found = resolve_model(str(model))
    assert resolve_model(str(model)) is found
    edit(model / "config.json", eos_token_id=[7, 8])
    assert resolve_model(str(model)).eos_token_ids != found.eos_token_ids
    (model / "config.json").unlink()
    with pytest.raises(ModelError):
        resolve_model(str(model))


def test_a_folder_that_was_written_just_now_is_checked_each_time(model):
    found = resolve_model(str(model))
    edit(model / "config.json")
    assert resolve_model(str(model)) is not found


def test_few_folders_are_kept(made):
    folder = resolve_model(str(made))
    for number in range(2 * folders._MOST_KEPT):
        folders._keep((number,), folder)
    assert len(folders._kept) == folders._MOST_KEPT
    folders._kept.clear()


def test_the_built_in_model_is_there():
    found = resolve_model("sage-tiny")
    assert found.facts.vocab_size > 256
    assert found.eos_token_ids


def test_the_null_model_has_facts_and_no_files():
    found = resolve_model("null")
    assert found.path is None
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        found.file("tokenizer.json")


def test_end_tokens_of_both_configs_count(model):
    (model / "generation_config.json").write_text('{"eos_token_id": [7, 299]}')
    assert resolve_model(str(model)).eos_token_ids == (299, 7)


def test_what_is_no_token_ends_nothing(model):
    ids = [True, -1, 7, 300, "</s>"]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert resolve_model(str(model)).eos_token_ids == (299, 7)


def test_the_hash_follows_the_config(model):
    before = resolve_model(str(model)).hash
    assert resolve_model(str(model)).hash == before
    edit(model / "config.json", rope_theta=5.0)
    assert resolve_model(str(model)).hash != before


def test_the_hash_follows_the_weights(model, made):
    before = resolve_model(str(model)).hash
    assert resolve_model(str(made)).hash == before
    make_model("llama", model, seed=1)
    assert resolve_model(str(model)).hash != before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sage-tinny", "did you mean sage-tiny"),
        ("./nowhere", "there is no such folder"),
        ("/no/where/at/all", "there is no such folder"),
    ],
)
def test_unknown_names_get_a_hint(name, reason):
    with pytest.raises(ModelError, match=reason):
        resolve_model(name)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(model, file):
    (model / file).unlink()
    with pytest.raises(ModelError, match=f"{file} is missing"):
        resolve_model(str(model))


def test_broken_json_is_named(model):
    (model / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        resolve_model(str(model))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused(model, file):
    (model / "model.safetensors").unlink()
    (model / file).write_bytes(b"")
    with pytest.raises(ModelError, match=r"only pickled weights .* convert them to safetensors"):
        resolve_model(str(model))


def test_remote_code_is_refused(model):
    edit(model / "config.json", auto_map={"AutoModel": "modeling.py"})
    with pytest.raises(UnsupportedModel, match="remote code never runs"):
        resolve_model(str(model))


def test_an_unknown_architecture_is_refused(model):
    edit(model / "config.json", architectures=["LlamaForCausalLN"])
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLN is not built.*of one of Llama"):
        resolve_model(str(model))


def index_of(model, weight_map):
    (model / folders.SHARD_INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_that_names_a_missing_shard_is_refused(model):
    index_of(model, {"a": "model.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(ModelError, match=r"names model-2\.safetensors, which is missing"):
        resolve_model(str(model))


def test_an_index_cannot_leave_its_folder(model):
    index_of(model, {"a": "../model.safetensors"})
    with pytest.raises(ModelError, match="outside its folder"):
        resolve_model(str(model))


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_an_index_without_a_map_is_refused(model, index):
    (model / folders.SHARD_INDEX).write_text(index)
    with pytest.raises(ModelError, match="no weight_map"):
        resolve_model(str(model))


def test_shards_are_grouped_by_file(model):
    index_of(model, {"a": "1", "b": "2", "c": "1"})
    assert shard_files("m", model) == {"1": ("a", "c"), "2": ("b",)}


def test_a_path_that_may_be_a_hub_id_is_told_to_be_no_folder(tmp_path, monkeypatch):
    def offline(name):
        raise HubError("the Hub has no such model, or it is private", "check the name")

    monkeypatch.setattr(folders, "download", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name, cause in (("models/a", "no such folder, and the Hub"), ("b/a", "b/a: the Hub has")):
        with pytest.raises(ModelError, match=cause):
            resolve_model(name)


def test_a_hub_id_is_downloaded(model, monkeypatch):
    monkeypatch.setattr(folders, "download", lambda name: model)
    assert resolve_model("owner/name").facts.family == "llama"


def test_without_the_hub_there_is_one_clear_error(monkeypatch):
    def offline(name):
        raise HubError("the Hub cannot be reached", "give a folder")

    monkeypatch.setattr(folders, "download", offline)
    with pytest.raises(ModelError, match=r"owner/name: the Hub cannot .*; give a folder"):
        resolve_model("owner/name")


def test_reading_facts_needs_no_torch():
    code = (
        "import sys; from sagellm.runtime.models.folder import resolve_model;"
        "import sagellm.runtime.engine.sizing, sagellm.runtime.models.tokenizer;"
        "resolve_model('sage-tiny'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
