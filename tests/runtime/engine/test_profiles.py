"""Profiles, and modelled engines with them."""

import json

import pytest

from sagellm.runtime.engine.costs.profile import (
    ProfileError,
    read_profile,
    shipped_profiles,
    write_profile,
)
from sagellm.runtime.engine.kinds.modelled import ModelledOptions, modelled_facts
from sagellm.runtime.engine.options import EngineOptionError
from sagellm.runtime.engine.step_cost import StepShape
from sagellm.runtime.models import ModelError
from sagellm.runtime.models.shapes import SHAPES, resolve_shape

ROOFLINES = ("a100-80g", "ascend-910b", "h100-sxm", "h200")


def test_the_shipped_profiles_load():
    assert set(ROOFLINES) <= set(shipped_profiles())
    for name in shipped_profiles():
        assert read_profile(name).name == name
    assert {read_profile(name).method for name in ROOFLINES} == {"roofline"}
    assert all(read_profile(name).source for name in ROOFLINES)


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("profile", ROOFLINES)
def test_any_model_runs_on_any_device(profile, model):
    cost = ModelledOptions(model=model, profile=profile).cost
    assert 0 < cost.seconds(StepShape(0, 0, 1, 1)) < cost.seconds(StepShape(0, 0, 64, 64_000))


@pytest.mark.parametrize(
    ("batch", "context", "measured_ms"), [(1, 1024, 4.57), (32, 1024, 6.05), (128, 2048, 13.5)]
)
def test_the_roofline_of_a_device_meets_published_decode_steps(batch, context, measured_ms):
    """Of Llama-3.1-8B on one H200."""
    cost = ModelledOptions(model="llama-3-8b", profile="h200").cost
    seconds = cost.seconds(StepShape(0, 0, batch, batch * context))
    assert seconds * 1e3 == pytest.approx(measured_ms, rel=0.06)


def test_a_group_of_devices_is_faster_but_not_twice():
    one, two = (
        ModelledOptions(model="llama-3-8b", profile="h200", tensor_parallel_size=size).cost
        for size in (1, 2)
    )
    shape = StepShape(0, 0, 1, 1024)
    assert one.seconds(shape) / 2 < two.seconds(shape) < one.seconds(shape)


def test_a_profile_is_written_and_read(tmp_path):
    file = tmp_path / "mine.json"
    write_profile(file, read_profile("h200"))
    assert read_profile(str(file)) == read_profile("h200")


@pytest.mark.parametrize(
    ("name", "fault"),
    [("h20", "did you mean h200"), ("./none.json", "no file"), ("x", "there are a100-80g")],
)
def test_an_unknown_profile_is_refused(name, fault):
    with pytest.raises(ProfileError, match=fault):
        read_profile(name)
    with pytest.raises(EngineOptionError, match=fault):
        _ = ModelledOptions(profile=name).cost


def test_a_faulty_profile_is_refused(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"name": "mine"}')
    with pytest.raises(ProfileError, match="no profile"):
        read_profile(str(file))


def measured(tmp_path, **changes):
    form = {
        "form": "fitted",
        "step_s": 1.0,
        "tokens": [0, 1],
        "token_seconds": [0, 1],
        "prefill_pair_s": 0.0,
        "contexts": [0],
        "context_seconds": [0],
        "row_s": 0.0,
    }
    profile = {"name": "m", "model": "sage-tiny", "device": "cpu", "method": "measured"}
    file = tmp_path / "m.json"
    file.write_text(json.dumps({**profile, "made_on": "2026-11-25", "cost": form, **changes}))
    return str(file)


def test_a_measured_profile_is_of_one_model(tmp_path):
    profile = measured(tmp_path)
    cost = ModelledOptions(model="sage-tiny", profile=profile).cost
    assert cost.seconds(StepShape(0, 0, 2, 20)) == 3.0
    with pytest.raises(EngineOptionError, match="measured with model sage-tiny"):
        _ = ModelledOptions(model="llama-3-8b", profile=profile).cost
    with pytest.raises(EngineOptionError, match="tensor_parallel_size"):
        _ = ModelledOptions(model="sage-tiny", profile=profile, tensor_parallel_size=2).cost


def test_a_profile_with_a_table_finds_it_beside_itself(tmp_path):
    rows = "prefill,1,0,1,1.0\ndecode,1,0,1,5.0\n"
    (tmp_path / "t.csv").write_text(f"kind,tokens,context,batch,seconds\n{rows}")
    profile = measured(tmp_path, cost={"form": "table", "file": "t.csv", "step_s": 2.0})
    assert ModelledOptions(profile=profile).cost.seconds(StepShape(0, 0, 1, 3)) == 7.0


def test_a_profile_excludes_costs():
    with pytest.raises(EngineOptionError, match="prefill_token_s"):
        ModelledOptions(profile="h200", prefill_token_s=1.0)
    with pytest.raises(EngineOptionError, match="tensor_parallel_size"):
        ModelledOptions(tensor_parallel_size=2)
    with pytest.raises(EngineOptionError, match="pipeline_parallel_size"):
        ModelledOptions(pipeline_parallel_size=2)


@pytest.mark.parametrize(
    ("model", "group", "reason"),
    [
        ("llama-3-8b", {"expert_parallel_size": 2}, "dense"),
        ("mixtral-8x7b", {"expert_parallel_size": 3}, "8 experts"),
        ("qwen2.5-7b", {"tensor_parallel_size": 8}, "28 attention heads"),
        ("llama-3-8b", {"pipeline_parallel_size": 33}, "32 layers"),
    ],
)
def test_a_model_that_a_group_cannot_share_is_refused(model, group, reason):
    with pytest.raises(EngineOptionError, match=reason):
        _ = ModelledOptions(model=model, profile="h200", **group).cost


@pytest.mark.parametrize("model", ["null", "llama-3-8b"])
def test_a_model_without_files_has_any_context(model):
    facts = modelled_facts(ModelledOptions(model=model, max_model_len=200_000))
    assert facts.max_model_len == 200_000


def test_a_model_with_files_keeps_its_context():
    with pytest.raises(EngineOptionError, match="made for"):
        modelled_facts(ModelledOptions(model="sage-tiny", max_model_len=200_000))


def test_an_unknown_shape_is_refused_with_the_nearest():
    with pytest.raises(ModelError, match="llama-3-8b"):
        resolve_shape("llama-3-9b")


def test_a_shape_has_the_parameters_that_its_publisher_states():
    billions = {name: round(facts.num_parameters / 1e9, 2) for name, facts in SHAPES.items()}
    assert billions == {
        "llama-3-8b": 8.03,
        "llama-3-70b": 70.55,
        "qwen2.5-7b": 7.62,
        "qwen2.5-72b": 72.71,
        "mistral-7b": 7.24,
        "mixtral-8x7b": 46.7,
        "qwen3-30b-a3b": 30.53,
    }
