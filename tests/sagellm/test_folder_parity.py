"""Unusual model folders: the tokens are those of transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models_on_the_fly import make_model, random_prompts, reference
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sagellm import Graph, Sampling

WEIGHTS = "model.safetensors"
NUM_NEW = 32


def half(folder: Path) -> None:
    """Weights in float16, as in many older folders."""
    weights = {name: weight.half() for name, weight in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))


def untied(folder: Path) -> None:
    """An untied output head, under a config.json that ties it."""
    weights = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(weights["model.embed_tokens.weight"].shape, generator=generator)
    save_file({**weights, "lm_head.weight": head * 0.3}, folder / WEIGHTS)


def sharded(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize("change", [half, untied, sharded])
@pytest.mark.parametrize("family", ["llama3", "qwen2"])
async def test_greedy_tokens_equal_transformers(
    family: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = make_model(family, tmp_path)
    change(folder)
    prompts = random_prompts((5, 33), seed=4)
    right = reference(folder, prompts, NUM_NEW)
    right.check()
    sampling = Sampling(max_tokens=NUM_NEW, ignore_eos=True)
    exact = {"g.deterministic": True}
    async with Graph.load("joint").open(set=exact, model=str(folder)) as session:
        answers = [await session.generate(prompt, sampling=sampling) for prompt in prompts]
    assert [list(answer.token_ids) for answer in answers] == right.tokens
