"""int4 and Q4_0 side by side, one random model after the other."""

from types import SimpleNamespace

import torch

from benchmarks import quality


class Shifted:
    """Logits that each scheme moves by an amount of its own."""

    def logits(self, scheme, prompts):
        right = torch.arange(12.0).view(2, 6)
        return right * {"as stored": 1.0, "int4": 1.1}.get(scheme.name, 1.2)


def test_every_seed_has_a_line_a_form_and_then_come_the_means(monkeypatch):
    monkeypatch.setattr(quality.Model, "drawn", lambda seed: Shifted())
    _, _, *lines = quality.by_seed([3, 5], prompt_len=1)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    forms = ["int4", "Q4_0, rows of 8 bits"]
    assert [row[:2] for row in cells] == [
        [name, form] for name in ("3", "5", "mean") for form in forms
    ]
    assert [row[2] for row in cells] == ["10.00%", "20.00%"] * 3


def test_large_keys_are_biases_of_one_number_in_each_half(monkeypatch):
    shape = SimpleNamespace(num_kv_heads=2, head_dim=6)
    monkeypatch.setattr(quality, "facts", lambda config: shape)
    names = ("model.layers.0.self_attn.k_proj.bias", "model.layers.0.self_attn.v_proj.bias")
    model = quality.Model({}, {name: torch.zeros(12) for name in names})
    found = model.with_large_keys(30.0).weights
    assert found[names[0]].tolist() == [30.0, 0.0, 0.0] * 4
    assert not found[names[1]].any()
    assert not model.weights[names[0]].any()
