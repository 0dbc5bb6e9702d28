"""The lowered program against transformers, on random models of every family."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sagellm.backends.cpu import CpuBackend

FAMILIES = ["llama", "llama_biased", "llama3", "mistral", "qwen2", "qwen2_sliding", "qwen3"]
NATIVE = pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 97, (count,), generator=generator).tolist()


def assert_near(found, wanted, tolerance=1e-4):
    assert (found - wanted).abs().max() < tolerance


@NATIVE
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_in_one_step(reference, paged, family, native):
    model, prompt = reference(family), tokens(150, seed=1)
    found = paged(model, CpuBackend(native=native)).step({"a": prompt})["a"]
    assert_near(found, model.logits(prompt))


@NATIVE
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_steps_of_chunks_and_decodes(reference, paged, family, native):
    model = reference(family)
    prompts = {name: tokens(70, seed) for seed, name in enumerate("abc")}
    sequences = paged(model, CpuBackend(native=native))
    found = {name: [] for name in prompts}
    for cut in [{"a": 30}, {"a": 1, "b": 7}, {"b": 40, "a": 1, "c": 1}, {"c": 20, "b": 1, "a": 2}]:
        starts = {name: sequences.lengths.get(name, 0) for name in cut}
        batch = {n: prompts[n][starts[n] : starts[n] + count] for n, count in cut.items()}
        for name, logits in sequences.step(batch).items():
            found[name].append(logits)
    for name, parts in found.items():
        rows = torch.cat(parts)
        assert_near(rows, model.logits(prompts[name])[: len(rows)])


@NATIVE
def test_a_step_without_logit_rows(reference, paged, native):
    model = reference("llama")
    sequences = paged(model, CpuBackend(native=native))
    sequences._grow("a", 3)
    none = np.empty(0, dtype=np.int64)
    inputs = replace(sequences._inputs({"a": [1, 2, 3]}), logit_rows=none)
    assert sequences.run(inputs).shape == (0, 97)


@NATIVE
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_a_block_held_before_does_not_spread(reference, paged, family, native):
    model, prompt = reference(family), tokens(14, seed=4)
    sequences = paged(model, CpuBackend(native=native))
    sequences.pool.fill_(torch.nan)
    found = [sequences.step({"a": part})["a"] for part in (prompt[:13], prompt[13:])]
    assert_near(torch.cat(found), model.logits(prompt))


@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_logits_of_chosen_rows_alone(reference, paged, family):
    model, prompt = reference(family), tokens(20, seed=3)
    sequences = paged(model)
    whole = sequences.step({"a": prompt})["a"]
    assert whole.dtype == torch.float32
    assert whole.shape == (20, 97)
