"""GPTQ and AWQ folders: the same values exactly, the same tokens, and clear refusals."""

import json

import numpy as np
import pytest
import torch
from engine_driver import running
from models_on_the_fly import make_model, random_prompts, reference
from quantised_on_the_fly import Form, quantise, quantise_folder
from safetensors.torch import load_file, save_file
from tensors import arrays

from sagellm.graphs.models import UnsupportedModel
from sagellm.graphs.models.config import stored_quantisation
from sagellm.runtime.engine.kinds.local import open_engine
from sagellm.runtime.engine.options import EngineOptions
from sagellm.runtime.engine.sizing import weight_bytes
from sagellm.runtime.models.folder import ModelError, resolve_model
from sagellm.runtime.models.stored_weights import awq, gptq, open_weights

FORMS = {
    "gptq": Form(),
    "gptq symmetric": Form(is_symmetric=True, group=64),
    "gptq 8 bits": Form(bits=8),
    "gptq 8 bits symmetric": Form(bits=8, is_symmetric=True, group=-1),
    "gptq v2": Form(version="gptq_v2"),
    "gptq out of order": Form(reorders=True),
    "gptq 8 bits out of order": Form(reorders=True, bits=8, group=64),
    "gptq one group": Form(group=-1),
    "awq": Form("awq"),
    "awq groups of 64": Form("awq", group=64),
}
ALL_FORMS = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
PROMPTS = random_prompts((1, 5, 40, 90))
NUM_NEW = 32


@ALL_FORMS
@pytest.mark.parametrize("size", [64, 192, 352])
def test_the_values_are_those_of_the_reference_exactly(form, size):
    torch.manual_seed(size)
    parts, floats = quantise(torch.randn(40, size) + 0.3, form)
    stored = stored_quantisation({"quantization_config": form.config})
    made = (awq if form.method == "awq" else gptq)(stored, arrays(parts))
    assert np.array_equal(made.dequantised(), floats)
    assert (made.zeros is None) == form.is_symmetric
    assert (made.order is not None) == (form.reorders and size > form.group)


def test_zeros_of_the_first_convention_wrap_around():
    """0 is stored as -1, which is 15 in 4 bits."""
    form = Form()
    parts, floats = quantise(torch.rand(8, 64), form)  # nothing below 0: zeros of 0
    made = gptq(stored_quantisation({"quantization_config": form.config}), arrays(parts))
    assert not made.zeros.any()
    assert np.array_equal(made.dequantised(), floats)


def test_one_group_need_not_be_whole_blocks():
    """The rows end within a block of 32, as a last group may."""
    form = Form(group=-1)
    parts, floats = quantise(torch.randn(16, 72), form)
    made = gptq(stored_quantisation({"quantization_config": form.config}), arrays(parts))
    assert made.group == 96
    assert np.array_equal(made.dequantised(), floats)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(form) -> (quantised, in floats), made once."""
    made = {}

    def make(form):
        if form not in made:
            target = tmp_path_factory.mktemp("model")
            source = make_model("qwen2", target / "source")
            made[form] = quantise_folder(source, target, form)
        return made[form]

    return make


async def greedy(folder, **options):
    options = {"model": str(folder), "max_model_len": 256, **options}
    async with running(open_engine(EngineOptions(**options), name="e")) as [driver]:
        for index, prompt in enumerate(PROMPTS):
            await driver.submit(str(index), prompt, max_tokens=NUM_NEW)
        await driver.all_done()
        return [reply.token_ids for reply in driver.replies.values()]


def num_clear(gaps):
    """Tokens before the first that another all but equalled.

    Activations of 16 bits move logits of these models, whose deviation is 19, by up to 0.06.
    """
    return next((index for index, gap in enumerate(gaps) if gap < 0.1), len(gaps))


@ALL_FORMS
async def test_tokens_are_those_of_transformers_on_the_floats(form, folders):
    stored, floats = folders(form)
    right = reference(floats, PROMPTS, NUM_NEW)
    clear = list(map(num_clear, right.gaps))
    assert sum(clear) > len(PROMPTS) * NUM_NEW / 3
    for found, wanted, num in zip(
        await greedy(stored, deterministic=True), right.tokens, clear, strict=True
    ):
        assert found[:num] == wanted[:num]


@ALL_FORMS
def test_the_size_is_known_from_the_config(form, folders):
    facts = resolve_model(str(folders(form)[0])).facts
    assert facts.weight_bits == form.bits + (0 if form.group == -1 else 32 / form.group)
    floats = resolve_model(str(folders(form)[1])).facts
    assert weight_bytes(EngineOptions(), facts) < 0.6 * weight_bytes(EngineOptions(), floats)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bits": 3}, "gptq of 3 bits is not built; 4 and 8 bits are"),
        ({"bits": 2}, "gptq of 2 bits is not built"),
        ({"bits": None}, "gptq of None bits"),
        ({"quant_method": "awq", "bits": 8}, "awq of 8 bits is not built; 4 bits are"),
        ({"quant_method": "gptqq"}, "not built; gptq and awq are built"),
        ({"quant_method": "fp8"}, "quant_method 'fp8' is not built; gptq and awq are built"),
        ({"quant_method": None}, "is not built"),
        ({"checkpoint_format": "marlin"}, "gptq in the format 'marlin' is not built"),
        ({"is_marlin_format": True}, "'marlin' is not built; convert the weights to gptq"),
        ({"quant_method": "awq", "version": "gemv"}, "awq in the format 'gemv' is not built"),
        ({"group_size": 16}, "group_size 16 is not built; give a multiple of 32, or -1"),
        ({"group_size": "all"}, "group_size 'all' is not built"),
        ({"dynamic": {"-:.*gate": {}}}, "settings by layer"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16' is not built"),
        ({"quant_method": "awq", "zero_point": False}, "awq without zero points"),
    ],
)
def test_what_is_not_built_is_refused_before_weights_are_read(changes, reason, folders, tmp_path):
    stored, _ = folders(FORMS["gptq"])
    config = json.loads((stored / "config.json").read_text())
    table = {**config["quantization_config"], **changes}
    if changes.get("quant_method") == "awq":
        table.pop("checkpoint_format")
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": table}))
    with pytest.raises(UnsupportedModel) as caught:
        resolve_model(str(tmp_path))
    assert reason in str(caught.value)
    assert caught.value.field == "quantization_config"


def without(parts, name):
    return {key: value for key, value in parts.items() if not key.endswith(name)}


def changed(name, change):
    return lambda parts: {
        key: change(value) if key.endswith(name) else value for key, value in parts.items()
    }


@pytest.mark.parametrize(
    ("form", "change", "reason"),
    [
        ("gptq", lambda parts: without(parts, "q_proj.scales"), "q_proj.scales is missing"),
        ("gptq", changed("up_proj.scales", lambda t: t[1:]), r"up_proj: scales \[\d, 128\]"),
        ("gptq", changed("up_proj.qzeros", lambda t: t[1:]), r"up_proj: .* and zeros \[\d, 128\]"),
        ("gptq", changed("up_proj.qweight", lambda t: t.long()), "not a matrix of int32"),
        ("gptq", changed("g_idx", lambda t: t.clamp(max=0)), "does not name groups of 32"),
        ("gptq out of order", lambda parts: without(parts, "g_idx"), "g_idx is missing"),
        ("gptq", changed("scales", lambda t: t.float() * 1.0001), "no place in float16"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(form, change, reason, folders, tmp_path):
    stored, _ = folders(FORMS[form])
    for file in stored.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    parts = load_file(stored / "model.safetensors")
    changed = {name: tensor.contiguous() for name, tensor in change(parts).items()}
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=reason):
        open_engine(EngineOptions(model=str(tmp_path)), name="e")


def test_a_missing_weight_is_named_in_whatever_form(folders):
    weights = open_weights(resolve_model(str(folders(FORMS["gptq"])[0])))
    weights.require(["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
    assert len(list(weights)) == len(weights)
    with pytest.raises(ModelError, match=r"up_projj\.weight is missing"):
        weights.require(["model.layers.0.mlp.up_projj.weight"])
