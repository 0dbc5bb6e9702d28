"""The measured models: random weights in bfloat16, made once."""

import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.shape import QWEN05, Shape


def model_folder(shape: Shape = QWEN05) -> Path:
    """The folder of the model in the user's cache. A missing model is made."""
    folder = cache_folder() / f"random-{shape.name}"
    if not (folder / "tokenizer.json").exists():  # the last file that is written
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(_config(shape))
        model.to(torch.bfloat16).save_pretrained(folder)
        _tokenizer(shape).save(str(folder / "tokenizer.json"))
    return folder


def cache_folder() -> Path:
    """The folder that keeps models and their converted copies between runs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "sagellm"


def _config(shape: Shape) -> Any:
    return AutoConfig.for_model(
        shape.family,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.max_len,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
    )


def _tokenizer(shape: Shape) -> Tokenizer:
    """One word a token. The size of the table does not change the cost of detokenising."""
    words = {f"w{number}": number for number in range(shape.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer
