"""A model family of a user's own, as docs/extending.md shows it, against transformers."""

import re
import textwrap
from pathlib import Path

import torch

import sagellm
from sagellm.graphs.models import family

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


def test_the_family_of_the_guide_computes_what_transformers_does(reference, paged, monkeypatch):
    found = re.search(
        r"\n\n(    from sagellm.graphs.models import ModelFamily, read_decoder\n.*?\)\n)\n\S",
        GUIDE.read_text(),
        re.S,
    )
    assert found
    with monkeypatch.context() as patched:
        patched.setattr(family, "FAMILIES", dict(family.FAMILIES))
        patched.setattr(family, "_registered", {})
        exec(textwrap.dedent(found[1]), {"sagellm": sagellm})
        changes = {"attention_bias": True, "attention_out_bias": True, "head_dim": 16}
        model = reference("llama", model_type="seed_oss", **changes)
        assert model.config["architectures"] == ["SeedOssForCausalLM"]
        prompt = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(5)).tolist()
        logits = paged(model).step({"a": prompt})["a"]
        assert (logits - model.logits(prompt)).abs().max() < 1e-4
