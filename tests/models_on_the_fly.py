"""Small random models of every family, and what transformers answers with them."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 300
EOS = VOCAB_SIZE - 1
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = ["the quick brown fox jumps over the lazy dog and the other dogs", "größer als 😀 日本語"]

SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": EOS,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": False},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 48, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": False},
}


def scarce_blocks(family: str) -> dict[str, int]:
    """Options with which prompts of 300 tokens are preempted; windows free what lies behind."""
    if "sliding_window" in FAMILIES[family]:
        return {"num_blocks": 14, "max_num_batched_tokens": 64}
    return {"num_blocks": 34, "max_num_batched_tokens": 2048}


def make_model(family: str, folder: Path, seed: int = 0, **changes: object) -> Path:
    """Write a random float32 model as a Hugging Face folder; equal arguments, equal weights."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**SMALL, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # norms and biases that matter, and logits far enough apart
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
        model.model.norm.weight *= 8
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {"eos_token": "<|eos|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


@functools.cache
def byte_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE with a few merges; the last id is <|eos|>."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    fill = VOCAB_SIZE - 1 - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<filler {index}>" for index in range(fill)])
    tokenizer.add_special_tokens(["<|eos|>"])
    assert tokenizer.token_to_id("<|eos|>") == EOS
    return tokenizer


@dataclass(frozen=True)
class Reference:
    """Greedy tokens of transformers, and how far the best logit was above the second."""

    tokens: list[list[int]]
    gaps: list[list[float]]

    def check(self) -> None:
        """That the answers are worth comparing."""
        assert min(len(set(tokens)) for tokens in self.tokens) >= 20
        assert min(min(gaps) for gaps in self.gaps) > 1e-3


def reference(folder: Path, prompts: Sequence[Sequence[int]], max_new: int) -> Reference:
    """Greedy decoding with transformers' own cache, one prompt at a time, no end-of-text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = [_greedy(model, prompt, max_new) for prompt in prompts]
    return Reference([tokens for tokens, _ in answers], [gaps for _, gaps in answers])


def reference_tokens(
    folder: Path, prompts: Sequence[Sequence[int]], max_new: int
) -> list[list[int]]:
    return reference(folder, prompts, max_new).tokens


def reference_gaps(
    folder: Path, prompts: Sequence[Sequence[int]], max_new: int
) -> list[list[float]]:
    return reference(folder, prompts, max_new).gaps


def random_prompts(lengths: Sequence[int], seed: int = 2) -> list[tuple[int, ...]]:
    """Prompts of those lengths over all ids but <|eos|>."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(0, EOS, (length,), generator=generator).tolist()) for length in lengths
    ]


@torch.inference_mode()
def _greedy(
    model: torch.nn.Module, prompt: Sequence[int], max_new: int
) -> tuple[list[int], list[float]]:
    tokens, gaps, cache, fed = [], [], None, list(prompt)
    for _ in range(max_new):
        output = model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
        best = output.logits[0, -1].float().topk(2)
        cache, fed = output.past_key_values, [int(best.indices[0])]
        tokens += fed
        gaps.append(float(best.values[0] - best.values[1]))
    return tokens, gaps
