"""Random models of every family with transformers as the reference, and a pool to run them on."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from tensors import arrays
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sagellm.backends.cpu import CpuBackend
from sagellm.backends.cpu.program import StepProgram
from sagellm.backends.cpu.torch_linear import array, tensor
from sagellm.backends.step import KVLayout, StepInputs
from sagellm.graphs.models import ModelFacts, build, facts

BLOCK_SIZE = 4

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-6,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 4},
    "llama_biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3": {
        "model_type": "llama",
        "rope_parameters": LLAMA3_ROPE,
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 11, "head_dim": 24},
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 8, "tie_word_embeddings": True},
    "qwen2_sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": False},
}


@dataclass(frozen=True)
class Reference:
    """A random transformers model, its config.json and its weights."""

    model: PreTrainedModel
    config: Mapping[str, object]
    weights: Mapping[str, torch.Tensor]

    @property
    def facts(self) -> ModelFacts:
        return facts(self.config)

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """[len(tokens), vocab] in float32."""
        with torch.no_grad():
            return self.model(torch.tensor([list(tokens)])).logits[0].float()

    def layout(self, dtype: str = "float32") -> KVLayout:
        shape = self.facts
        return KVLayout(shape.num_layers, shape.num_kv_heads, shape.head_dim, BLOCK_SIZE, dtype)


@dataclass
class Paged:
    """Sequences on one pool with scattered blocks, stepped as an engine would."""

    program: StepProgram
    pool: torch.Tensor
    free: list[int]
    blocks: dict[str, list[int]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)

    def step(self, batch: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """New tokens by sequence -> logits of each of them."""
        for name, tokens in batch.items():
            self._grow(name, len(tokens))
        logits = self.run(self._inputs(batch))
        counts = [len(tokens) for tokens in batch.values()]
        return dict(zip(batch, logits.split(counts), strict=True))

    def run(self, inputs: StepInputs) -> torch.Tensor:
        """The logits of a step, on as many threads as torch has."""
        logits = self.program.run(inputs, array(self.pool), torch.get_num_threads())
        return torch.from_numpy(logits)

    def _grow(self, name: str, count: int) -> None:
        self.lengths[name] = self.lengths.get(name, 0) + count
        blocks = self.blocks.setdefault(name, [])
        while len(blocks) * BLOCK_SIZE < self.lengths[name]:
            blocks.append(self.free.pop())

    def _inputs(self, batch: Mapping[str, Sequence[int]]) -> StepInputs:
        lens = [len(tokens) for tokens in batch.values()]
        contexts = [self.lengths[name] for name in batch]
        places = [
            (name, self.lengths[name] - len(tokens) + index)
            for name, tokens in batch.items()
            for index in range(len(tokens))
        ]
        longest = max(len(self.blocks[name]) for name in batch)
        tables = [self.blocks[n] + [0] * (longest - len(self.blocks[n])) for n in batch]
        return StepInputs(
            token_ids=np.array(list(itertools.chain(*batch.values()))),
            positions=np.array([place for _, place in places]),
            slots=np.array([self._slot(*place) for place in places]),
            query_starts=np.array([0, *itertools.accumulate(lens)]),
            context_lens=np.array(contexts),
            block_tables=np.array(tables, dtype=np.int32),
            logit_rows=np.arange(len(places)),
            states=np.empty((2, len(lens), 0), dtype=np.int32),
            query_lens=tuple(lens),
            contexts=tuple(contexts),
        )

    def _slot(self, name: str, place: int) -> int:
        return self.blocks[name][place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE


@pytest.fixture(scope="session")
def reference() -> Callable[..., Reference]:
    """reference(family, **config) -> a random model; the same arguments give the same weights."""
    made: dict[tuple[str, str], Reference] = {}

    def make(family: str, **changes: object) -> Reference:
        key = (family, repr(changes))
        if key not in made:
            made[key] = _reference({**SMALL, **FAMILIES[family], **changes})
        return made[key]

    return make


@pytest.fixture
def paged() -> Callable[..., Paged]:
    """paged(reference, backend, dtype, deterministic, quantization): sequences on a fresh pool."""

    def make(
        model: Reference,
        backend: CpuBackend | None = None,
        *,
        dtype: str = "float32",
        deterministic: bool = False,
        quantization: str | None = None,
    ) -> Paged:
        backend, layout = backend or CpuBackend(), model.layout(dtype)
        options = {"layout": layout, "dtype": dtype, "deterministic": deterministic}
        options["quantization"] = quantization
        weights = arrays(model.weights)
        program = backend.device().lower(build(model.config), weights, **options)
        pool = tensor(backend.device().allocate(layout, 300).pool)
        return Paged(program, pool.fill_(7.0), free=[(i * 7) % 300 for i in range(1, 300)])

    return make


@pytest.fixture
def kept_threads() -> Iterator[None]:
    """torch's number of threads, as it was before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _reference(changes: dict[str, object]) -> Reference:
    torch.manual_seed(5)
    config = AutoConfig.for_model(**changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, weight in model.named_parameters():  # biases and norms that matter
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    plain = {"architectures": [type(model).__name__], **config.to_dict()}
    plain["architectures"] = [type(model).__name__]
    return Reference(model, plain, dict(model.state_dict()))
