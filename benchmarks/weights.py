"""The model that is measured: the shape of Qwen2.5-0.5B, random weights, bfloat16; made once."""

import os
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.shape import HIDDEN, INTERMEDIATE, KV_WIDTH, NUM_LAYERS, VOCAB_SIZE

CONFIG = Qwen2Config(
    vocab_size=VOCAB_SIZE,
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=HIDDEN // 64,
    num_key_value_heads=KV_WIDTH // 64,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    eos_token_id=0,
    dtype="bfloat16",
)


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
