"""The loss of quality by quantised weights: `python -m benchmarks.quality`.

`python -m benchmarks.quality 5` compares int4 with Q4_0 on five random models instead.

On sage-tiny: the share of right answers to exercises outside the training set, and the perplexity
of the answers. On random weights of the shape of Qwen2.5-0.5B: the distance of logits from those of
float weights. The engine's modes are compared with the plain formulas of Q8_0 and Q4_0.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.weights import model_folder
from sagellm.backends import KVLayout, StepInputs
from sagellm.backends.arrays import Array
from sagellm.backends.cpu import CpuBackend
from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.cpu.quantised_linear import quantise
from sagellm.backends.cpu.torch_linear import array, quantised
from sagellm.backends.quantised_weight import GROUP_SIZE, QuantisedWeight
from sagellm.graphs.models import build, facts
from sagellm.runtime.models.folder import resolve_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
_exercises: Any = importlib.import_module("exercises")  # a folder of scripts, no package

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
_BLOCK_SIZE = 16
_FEW_WORDS = 8192
_USER, _END, _ASSISTANT = 259, 257, 260  # token ids of sage-tiny
Make = Callable[[torch.Tensor], torch.Tensor | QuantisedWeight]


@dataclass(frozen=True)
class Scheme:
    """How the weights of the layers and of the head are quantised, and the precision of their rows.

    `mode` is a quantisation of the engine. Without a mode, 4-bit weights take rows of 8 bits, other
    weights rows of 16 bits.
    """

    name: str
    bits: float
    mode: str | None = None
    layers: Make | None = None
    head: Make | None = None


@dataclass(frozen=True)
class Model:
    """A config, and its weights. The output layer has weights of its own name, also if tied."""

    config: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, folder: Path) -> "Model":
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        weights.setdefault(HEAD, weights[TABLE])
        return cls({**config, "tie_word_embeddings": False}, weights)

    @classmethod
    def drawn(cls, seed: int) -> "Model":
        """Random weights of the shape of Qwen2.5-0.5B, with a smaller vocabulary to save time."""
        config = AutoConfig.from_pretrained(model_folder())
        config.vocab_size = _FEW_WORDS
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        weights = dict(model.state_dict())
        weights[HEAD] = weights[TABLE]
        return cls({**config.to_dict(), "tie_word_embeddings": False}, weights)

    def logits(self, scheme: Scheme, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits as [tokens of all prompts, vocabulary]; activations and KV are float32."""
        shape = facts(self.config)
        heads = shape.num_layers, shape.num_kv_heads, shape.head_dim
        layout, device = KVLayout(*heads, _BLOCK_SIZE, "float32"), CpuBackend().device()
        program: Any = device.lower(
            build(self.config),
            {name: _stored(_made(scheme, name, weight)) for name, weight in self.weights.items()},
            layout=layout,
            dtype="float32",
            deterministic=False,
            quantization=scheme.mode,
        )
        inputs, num_blocks = _inputs(prompts)
        pool: Any = device.allocate(layout, num_blocks)
        return torch.from_numpy(program.run(inputs, pool.pool, torch.get_num_threads()))


def _stored(weight: torch.Tensor | QuantisedWeight) -> Array | QuantisedWeight:
    return array(weight) if isinstance(weight, torch.Tensor) else weight


def _made(scheme: Scheme, name: str, weight: torch.Tensor) -> torch.Tensor | QuantisedWeight:
    if name == HEAD and scheme.head:
        return scheme.head(weight)
    is_linear = weight.dim() == 2 and name not in (HEAD, TABLE)
    return scheme.layers(weight) if is_linear and scheme.layers else weight


def _inputs(prompts: Sequence[Sequence[int]]) -> tuple[StepInputs, int]:
    """Inputs of one step that prefills whole prompts and returns logits of every row."""
    lens = [len(prompt) for prompt in prompts]
    blocks = [-(-size // _BLOCK_SIZE) for size in lens]
    firsts = np.cumsum([0, *blocks]).tolist()
    positions = [np.arange(size) for size in lens]
    slots = [first * _BLOCK_SIZE + at for first, at in zip(firsts, positions, strict=False)]
    tables = np.zeros((len(prompts), max(blocks)), dtype=np.int32)
    for row, (first, count) in enumerate(zip(firsts, blocks, strict=False)):
        tables[row, :count] = np.arange(first, first + count)
    inputs = StepInputs(
        token_ids=np.array([token for prompt in prompts for token in prompt]),
        positions=np.concatenate(positions),
        slots=np.concatenate(slots),
        query_starts=np.cumsum([0, *lens]),
        context_lens=np.array(lens),
        block_tables=tables,
        logit_rows=np.arange(sum(lens)),
        states=np.empty((2, len(lens), 0), dtype=np.int32),
        query_lens=tuple(lens),
        contexts=tuple(lens),
    )
    return inputs, firsts[-1]


def plain(bits: int) -> Make:
    """Q8_0: scale = largest / 127. Q4_0: scale = signed largest / -8. Groups of 32 values."""
    low, high, top = (-8, 7, -8.0) if bits == 4 else (-127, 127, 127.0)

    def make(weight: torch.Tensor) -> QuantisedWeight:
        groups = weight.float().view(len(weight), -1, GROUP_SIZE)
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scales = ((largest if bits == 4 else largest.abs()) / top).half()
        wide = scales.float()
        codes = (groups / torch.where(wide == 0, 1.0, wide)).round().clamp(low, high).flatten(1)
        codes = (codes + 8).to(torch.uint8) if bits == 4 else codes.to(torch.int8)
        return QuantisedWeight(bits, GROUP_SIZE, array(codes), array(scales.squeeze(-1)))

    return make


def per_channel(weight: torch.Tensor) -> torch.Tensor:
    """8-bit weights with one scale a row, as floats."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def ours(bits: int) -> Make:
    kernels = native_kernels()
    if kernels is None:
        return lambda weight: quantised(weight, bits)
    return lambda weight: quantise(kernels, array(weight), bits)


FLOATS = Scheme("as stored", 16)
INT4 = Scheme("int4", 4.5, "int4")
Q4_0 = Scheme("Q4_0, rows of 8 bits", 4.5, None, plain(4), plain(8))
SCHEMES = (
    Scheme("int8", 8.5, "int8"),
    Scheme("Q8_0, exact rows", 8.5, None, plain(8), plain(8)),
    Scheme("int8, a scale a row", 8.0, None, per_channel, per_channel),
    Scheme("w8a8", 8.5, "w8a8"),
    Scheme("Q8_0, rows of 8 bits", 8.5, "w8a8", plain(8), plain(8)),
    INT4,
    Q4_0,
    Scheme("int4, its logits too", 4.5, None, ours(4), ours(4)),
)


def _drawn(kind: str, count: int) -> Any:
    return _exercises.exercises(kind, count, seed=1)


def exercised(model: Model, scheme: Scheme, count: int) -> tuple[float, float]:
    """The share of right answers to `count` exercises of each kind, and their perplexity.

    An answer is right if each of its tokens is the most likely one: greedy decoding would give it.
    """
    asked = [one for kind in _exercises.KINDS for one in _drawn(kind, count)]
    answers = [[*one.answer.encode(), _END] for one in asked]
    rows = [
        [_USER, *one.prompt.encode(), _END, _ASSISTANT, *answer]
        for one, answer in zip(asked, answers, strict=True)
    ]
    logits = torch.split(model.logits(scheme, rows).log_softmax(-1), [len(row) for row in rows])
    num_right, losses = 0, []
    for answer, row in zip(answers, logits, strict=True):
        wanted, said = torch.tensor(answer), row[-len(answer) - 1 : -1]
        num_right += int(torch.equal(said.argmax(-1), wanted))
        losses.append(-said.gather(1, wanted[:, None]).flatten())
    return num_right / len(asked), float(torch.cat(losses).mean().exp())


def distances(found: torch.Tensor, right: torch.Tensor) -> tuple[float, float, float]:
    """Relative RMS error, mean KL divergence, and the share of rows with equal top tokens."""
    true, said = right.log_softmax(-1), found.log_softmax(-1)
    divergence = (true.exp() * (true - said)).sum(-1).mean()
    same = (found.argmax(-1) == right.argmax(-1)).float().mean()
    return float((found - right).norm() / right.norm()), float(divergence), float(same)


def table(count: int = 200, prompt_len: int = 64) -> str:
    """Every scheme on both models, as a table in Markdown."""
    path = resolve_model("sage-tiny").path
    assert path is not None
    tiny, random = Model.of(path), Model.of(model_folder())
    torch.manual_seed(0)
    prompts = torch.randint(0, random.config["vocab_size"], (2, prompt_len)).tolist()
    right = random.logits(FLOATS, prompts)
    lines = [
        "| weights | bits | exercises right | perplexity | logit error | KL | same token |",
        "|---|---|---|---|---|---|---|",
    ]
    for scheme in (FLOATS, *SCHEMES):
        share, perplexity = exercised(tiny, scheme, count)
        error, divergence, same = distances(random.logits(scheme, prompts), right)
        lines.append(
            f"| {scheme.name} | {scheme.bits} | {share:.1%} | {perplexity:.4f} "
            f"| {error:.2%} | {divergence:.1e} | {same:.1%} |"
        )
    return "\n".join(lines)


def by_seed(seeds: Iterable[int], prompt_len: int = 64) -> Iterator[str]:
    """The 4-bit forms on random models, and their means. Yields Markdown line by line."""
    found: dict[str, list[tuple[float, float, float]]] = {INT4.name: [], Q4_0.name: []}
    yield from ("| seed | weights | logit error | KL | same token |", "|---|---|---|---|---|")
    for seed in seeds:
        model = Model.drawn(seed)
        prompts = torch.randint(0, _FEW_WORDS, (2, prompt_len)).tolist()
        right = model.logits(FLOATS, prompts)
        for scheme in (INT4, Q4_0):
            found[scheme.name].append(distances(model.logits(scheme, prompts), right))
            yield _line(str(seed), scheme.name, found[scheme.name][-1])
    for name, measured in found.items():
        yield _line("mean", name, torch.tensor(measured).mean(0).tolist())


def _line(seed: str, name: str, found: Sequence[float]) -> str:
    error, divergence, same = found
    return f"| {seed} | {name} | {error:.2%} | {divergence:.1e} | {same:.1%} |"


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    for line in by_seed(range(int(sys.argv[1]))) if len(sys.argv) > 1 else [table()]:
        print(line, flush=True)
