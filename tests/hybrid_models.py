"""A model family with layers of full attention, of a window, and of a recurrent state.

A whole pass in plain torch is the reference.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models_on_the_fly import CHAT_TEMPLATE, EOS, VOCAB_SIZE, byte_tokenizer
from safetensors.torch import load_file, save_file

from sagellm.graphs.ir import Graph
from sagellm.graphs.kernels.memory_layout import weight_shapes
from sagellm.graphs.models import FAMILIES, build
from sagellm.graphs.models.config import Config
from sagellm.graphs.models.decoder import (
    Decoder,
    KernelGraphBuilder,
    NodeOutlet,
    attention,
    decoder_graph,
    linear,
)
from sagellm.graphs.models.family import ModelFamily, read_decoder

NAME = "HybridForCausalLM"
WINDOW = 24
LAYERS = ("linear", "full", "linear", "window")
HEADS, KV_HEADS, DIM, HIDDEN, INNER = 4, 2, 16, 64, 128
CONFIG: dict[str, object] = {
    "architectures": [NAME],
    "dtype": "float32",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": len(LAYERS),
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "eos_token_id": EOS,
    "mixers": list(LAYERS),
}


def _shape(config: Config) -> Decoder:
    mixers = config["mixers"]
    assert isinstance(mixers, list)
    windows = tuple(WINDOW if mixer == "window" else None for mixer in mixers)
    return read_decoder(config, "-".join(mixers), windows=windows)


def _graph(shape: Decoder) -> Graph:
    mixers = shape.family.split("-")

    def mixer(
        build: KernelGraphBuilder, shape: Decoder, layer: int, normed: NodeOutlet
    ) -> NodeOutlet:
        mix = _linear_attention if mixers[layer] == "linear" else attention
        return mix(build, shape, layer, normed)

    return decoder_graph(shape, mixer)


def _linear_attention(
    build: KernelGraphBuilder, shape: Decoder, layer: int, normed: NodeOutlet
) -> NodeOutlet:
    size = shape.num_heads * shape.head_dim
    widths = {"q": size, "k": size, "v": size, "gate": shape.num_heads}
    given = {
        role: _product(build, layer, role, normed, (shape.hidden_size, width))
        for role, width in widths.items()
    }
    mixed = build.add_stateful(
        f"layer{layer}_linear_attention",
        "linear_attention",
        given,
        ("query_starts", "context_lens", "states"),
        layer=layer,
        num_heads=shape.num_heads,
        key_dim=shape.head_dim,
        value_dim=shape.head_dim,
        scale=shape.head_dim**-0.5,
    )
    return _product(build, layer, "o", mixed, (size, shape.hidden_size))


def _product(
    build: KernelGraphBuilder, layer: int, role: str, rows: NodeOutlet, sizes: tuple[int, int]
) -> NodeOutlet:
    path = f"model.layers.{layer}.linear_attn.{role}_proj"
    return linear(build, f"layer{layer}_linear_{role}_proj", path, rows, sizes, False)


FAMILY = ModelFamily(NAME, _shape, _graph)


@contextmanager
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(FAMILIES, NAME, FAMILY)
        yield


def make_hybrid(folder: Path, mixers: Sequence[str] = LAYERS) -> Path:
    """Write a folder with a random model of the given layers."""
    config = {**CONFIG, "mixers": list(mixers), "num_hidden_layers": len(mixers)}
    draw = torch.Generator().manual_seed(3)
    weights = {
        name: torch.randn(shape, generator=draw) * (0.3 if len(shape) > 1 else 0.1)
        + (len(shape) == 1)
        for name, shape in weight_shapes(build(config)).items()
    }
    weights["model.norm.weight"] *= 4
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    said = {"eos_token": "<|eos|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


# ---- the reference: one pass over all tokens, nothing is kept ------------------------------------


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: faster for products of a few rows, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.inference_mode()
def greedy(folder: Path, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """The most probable token at each position of an answer, from one pass over the answer.

    The result equals `answer` if `answer` is greedy.
    """
    weights = load_file(folder / "model.safetensors")
    mixers = json.loads((folder / "config.json").read_text())["mixers"]
    logits = _logits(weights, mixers, [*prompt, *answer[:-1]])
    best: list[int] = logits[len(prompt) - 1 :].argmax(-1).tolist()
    return best


def _logits(
    weights: Mapping[str, torch.Tensor], mixers: Sequence[str], tokens: Sequence[int]
) -> torch.Tensor:
    rows = weights["model.embed_tokens.weight"][list(tokens)]
    for layer, mixer in enumerate(mixers):
        here = {
            name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): weight
            for name, weight in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        normed = F.rms_norm(rows, (HIDDEN,), here["input_layernorm"], 1e-6)
        rows = rows + (_recurrent if mixer == "linear" else _attending)(here, normed, mixer)
        normed = F.rms_norm(rows, (HIDDEN,), here["post_attention_layernorm"], 1e-6)
        opened = F.silu(normed @ here["mlp.gate_proj"].T) * (normed @ here["mlp.up_proj"].T)
        rows = rows + opened @ here["mlp.down_proj"].T
    normed = F.rms_norm(rows, (HIDDEN,), weights["model.norm.weight"], 1e-6)
    return normed @ weights["lm_head.weight"].T


def _recurrent(here: Mapping[str, torch.Tensor], normed: torch.Tensor, _: str) -> torch.Tensor:
    q, k, v = ((normed @ here[f"linear_attn.{role}_proj"].T).view(-1, HEADS, DIM) for role in "qkv")
    gates = F.logsigmoid(normed @ here["linear_attn.gate_proj"].T).cumsum(0).T
    kept = (
        (gates[:, :, None] - gates[:, None]).tril().exp().tril()
    )  # the share of token s in the state at token t
    scores = torch.einsum("thd,shd->hts", q * DIM**-0.5, k) * kept
    out = torch.einsum("hts,shd->thd", scores, v)
    return out.flatten(1) @ here["linear_attn.o_proj"].T


def _attending(here: Mapping[str, torch.Tensor], normed: torch.Tensor, mixer: str) -> torch.Tensor:
    q, k, v = (
        (normed @ here[f"self_attn.{role}_proj"].T).view(len(normed), -1, DIM).transpose(0, 1)
        for role in "qkv"
    )
    k, v = (rows.repeat_interleave(HEADS // KV_HEADS, 0) for rows in (_rotated(k), v))
    at = torch.arange(len(normed))
    back = at[:, None] - at
    seen = (back >= 0) & (back < (WINDOW if mixer == "window" else len(normed)))
    scores = (_rotated(q) @ k.transpose(1, 2) * DIM**-0.5).masked_fill(~seen, -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return mixed @ here["self_attn.o_proj"].T


def _rotated(heads: torch.Tensor) -> torch.Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    angles = torch.arange(heads.shape[1])[:, None] * frequencies
    a, b = heads.chunk(2, -1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)
