"""The step in one native call where the CPU has tiles: its logits, and when it uses no tiles."""

import pytest
import torch
from tile_kernels import WAYS, kernels_by

from sagellm.backends.cpu import program
from sagellm.backends.cpu.linear import PackedLinear
from sagellm.backends.cpu.native.c_structs import NativeLinear
from sagellm.backends.cpu.program import NativeProgram

FAMILIES = ["llama_biased", "mistral", "qwen2_sliding", "qwen3"]
RAGGED = [{"a": 30, "b": 1}, {"a": 20, "b": 47, "c": 1}, {"c": 60, "b": 1, "a": 1}, {"a": 40}]


@pytest.fixture(params=WAYS)
def kernels(request, monkeypatch):
    """The kernels with tiles, which programs use in this test."""
    found = kernels_by(request.param)
    if not found.has_pairs:
        pytest.skip("a CPU that multiplies no pairs of bfloat16")
    monkeypatch.setattr(program, "native_kernels", lambda *_: found)
    return found


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 97, (count,), generator=generator).tolist()


def sequences(paged, model, **options):
    made = paged(model, dtype="bfloat16", **options)
    assert isinstance(made.program, NativeProgram)
    return made


def multiplied_by(made):
    """The addresses of the functions that multiply in a program."""
    kept = [kernel.keep for kernel in made.program._translation.kernels]
    linears = [found for found in kept if isinstance(found, PackedLinear)]
    return {NativeLinear.from_address(linear.address).run for linear in linears}


def in_steps(made, prompts):
    """The logits of all rows of RAGGED."""
    found = []
    for cut in RAGGED:
        starts = {name: made.lengths.get(name, 0) for name in cut}
        batch = {n: prompts[n][starts[n] : starts[n] + count] for n, count in cut.items()}
        found += made.step(batch).values()
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_as_near_to_transformers_as_those_of_vectors(
    reference, paged, kernels, monkeypatch, family
):
    model, prompts = reference(family), {name: tokens(150, ord(name)) for name in "abc"}
    by_tiles = in_steps(sequences(paged, model), prompts)
    monkeypatch.setattr(type(kernels), "has_tiles", False)
    by_vectors = in_steps(sequences(paged, model), prompts)
    wanted = {name: model.logits(prompt) for name, prompt in prompts.items()}
    done, rows = dict.fromkeys(prompts, 0), []
    for cut in RAGGED:
        for name, count in cut.items():
            rows.append(wanted[name][done[name] : done[name] + count])
            done[name] += count
    exact = torch.cat(rows)
    assert not torch.equal(by_tiles, by_vectors)
    assert (by_tiles - exact).abs().mean() < 1.05 * (by_vectors - exact).abs().mean()
    assert (by_tiles - by_vectors).abs().mean() < 0.5 * (by_vectors - exact).abs().mean()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_step_and_its_kernels_one_by_one_use_the_same_tiles(
    reference, paged, kernels, monkeypatch, family
):
    model, prompt = reference(family), tokens(90, seed=1)
    step = sequences(paged, model)
    monkeypatch.setattr(program, "NATIVE_FORMS", {})
    kernel_by_kernel = paged(model, dtype="bfloat16")
    assert not isinstance(kernel_by_kernel.program, NativeProgram)
    assert multiplied_by(step) == {kernels.function("sage_multiply_tiles")}
    found, wanted = (way.step({"a": prompt})["a"] for way in (step, kernel_by_kernel))
    assert torch.allclose(found, wanted, atol=1e-4)


def test_a_deterministic_program_uses_no_tiles(reference, paged, kernels):
    made = sequences(paged, reference("qwen3"), deterministic=True)
    assert multiplied_by(made) == {kernels.function("sage_multiply_pairs")}
    assert not made.program._step.batch.tiles
    prompt = tokens(80, seed=2)
    whole = made.step({"a": prompt})["a"]
    parts = [made.step({"b": prompt[at : at + 5]})["b"] for at in range(0, 80, 5)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_refused_permission_leaves_the_vectors(reference, paged, kernels, monkeypatch):
    monkeypatch.setattr(type(kernels), "has_tiles", False)
    made = sequences(paged, reference("qwen3"))
    assert multiplied_by(made) == {kernels.function("sage_multiply_pairs")}
    assert not made.program._step.batch.tiles


def test_float32_weights_need_no_tiles(reference, paged, kernels):
    made = paged(reference("qwen3"), dtype="float32")
    assert multiplied_by(made) == {kernels.function("sage_multiply_float")}
