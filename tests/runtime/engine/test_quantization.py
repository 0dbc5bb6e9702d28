"""The option `quantization`: what is refused, and what it changes in an engine's facts."""

import dataclasses

import pytest

from sagellm.backends import get_backend
from sagellm.backends.quantised_weight import MODES
from sagellm.runtime.engine import device_resources
from sagellm.runtime.engine.kinds.local import open_device, open_engine
from sagellm.runtime.engine.options import EngineOptionError, EngineOptions
from sagellm.runtime.engine.sizing import engine_facts, size, weight_bytes
from sagellm.runtime.models.folder import resolve_model

TINY = resolve_model("sage-tiny")


def facts_of(options, folder):
    memory_bytes = open_device(options).memory_bytes
    return engine_facts(options, folder, size(options, folder.facts, memory_bytes))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quantization": "int-8"}, "quantization: 'int-8' is unknown; did you mean int8?"),
        ({"quantization": "w4a8"}, "did you mean w8a8?"),
        ({"quantization": "awq!!!"}, "use int8, int4, w8a8"),
        ({"quantization": "int8", "device": "null"}, "null computes nothing"),
        ({"quantization": "int8", "model": "null"}, "null computes nothing"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(options, reason):
    with pytest.raises(EngineOptionError) as caught:
        EngineOptions(**options)
    assert reason in str(caught.value)


def test_a_device_without_the_mode_refuses_it_before_weights_are_read(monkeypatch):
    class Plain:
        name = "plain"
        quantizations = ("w8a8",)

    monkeypatch.setattr(device_resources, "get_backend", lambda _: Plain())
    with pytest.raises(EngineOptionError, match="device plain has no int8; it has w8a8"):
        open_engine(EngineOptions(quantization="int8", dtype="float32"), name="e")


def test_weights_that_are_stored_in_few_bits_are_not_quantised_again():
    stored = dataclasses.replace(TINY, facts=dataclasses.replace(TINY.facts, weight_bits=4.25))
    with pytest.raises(EngineOptionError, match="stored in few bits already; drop it"):
        facts_of(EngineOptions(quantization="int8"), stored)


def test_models_of_different_modes_do_not_continue_each_other():
    modes = (None, *MODES)
    found = {facts_of(EngineOptions(quantization=mode), TINY).model_hash for mode in modes}
    assert len(found) == len(modes)


@pytest.mark.parametrize("mode", [None, *MODES])
def test_the_size_of_the_weights_is_known_before_they_are_loaded(mode):
    """The model is so large that the tensors not counted exactly (norms, scales) are small."""
    options = EngineOptions(quantization=mode, dtype="bfloat16")
    told = weight_bytes(options, TINY.facts)
    table = TINY.facts.vocab_size * TINY.facts.hidden_size
    layers = TINY.facts.num_parameters - table
    bits = {None: 16, "int8": 8.5, "w8a8": 8.5, "int4": 4.5}[mode]
    logits = 0 if mode is None else table * bits / 8
    assert told == pytest.approx(2 * table + logits + layers * bits / 8, rel=1e-6)
    assert size(options, TINY.facts, 2**34).weight_bytes == told


def test_smaller_weights_leave_more_blocks():
    facts = dataclasses.replace(TINY.facts, num_parameters=3 * 10**9, max_model_len=10**7)
    options = {"dtype": "bfloat16"}
    plain = size(EngineOptions(**options), facts, 7 * 10**9)
    small = size(EngineOptions(**options, quantization="int4"), facts, 7 * 10**9)
    assert small.num_blocks > plain.num_blocks


def test_the_backend_of_the_null_device_has_no_modes():
    assert get_backend("null").quantizations == ()
