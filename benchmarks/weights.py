"""The model that is measured: the shape of Qwen2.5-0.5B, random weights, bfloat16; made once."""

import os
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.cells import VOCAB_SIZE

CONFIG = Qwen2Config(
    vocab_size=VOCAB_SIZE,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    eos_token_id=0,
    dtype="bfloat16",
)

# Every layer's linears and the output layer, which reads the tied embedding.
_LAYER = 2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864
NUM_READ_A_TOKEN = 24 * _LAYER + VOCAB_SIZE * 896
BYTES_A_TOKEN = 2 * NUM_READ_A_TOKEN


def model_folder() -> Path:
    """The folder of the model, in the user's cache; made where it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "sagellm" / "random-qwen2.5-0.5b"
    if not (folder / "tokenizer.json").exists():  # written last
        torch.manual_seed(0)
        Qwen2ForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(folder)
        _tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def _tokenizer() -> Tokenizer:
    """One word a token: detokenising costs what it costs with any table."""
    words = {f"w{number}": number for number in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def prefill_flops(prompt_len: int) -> float:
    """Floating-point operations until the first token; logits are needed of one row only."""
    linears = 2.0 * 24 * _LAYER * prompt_len + 2.0 * VOCAB_SIZE * 896
    attention = 2.0 * 24 * 896 * prompt_len**2  # two products over the causal half
    return linears + attention
