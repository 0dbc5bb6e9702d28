"""Small random models that embed, as folders, and the vectors of transformers for them."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from models_on_the_fly import SMALL
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel

VOCAB_SIZE = 300
CLS, PAD, SEP, UNK = range(4)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
}
EMBEDDERS: dict[str, dict[str, Any]] = {
    "bert": {**SHAPE, "model_type": "bert"},
    "xlm-roberta": {**SHAPE, "model_type": "xlm-roberta", "type_vocab_size": 1},
    "qwen3": {**SMALL, "model_type": "qwen3", "head_dim": 32, "max_position_embeddings": 130},
    "mistral": {**SMALL, "model_type": "mistral", "sliding_window": 5},
}
_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}


def make_embedder(
    family: str,
    folder: Path,
    *,
    pooling: str = "cls",
    normalize: bool = True,
    modules: bool = True,
    **changes: Any,
) -> Path:
    """Write a random float32 model in the layout of sentence-transformers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**EMBEDDERS[family], **changes})
    model = AutoModel.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # norms and biases that matter
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                torch.nn.init.normal_(weight, mean=float("norm" in name.lower()), std=0.3)
    model.save_pretrained(folder)
    word_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    )
    if modules:
        write_modules(folder, pooling, normalize=normalize)
    return folder


def write_modules(folder: Path, pooling: str, *, normalize: bool = True) -> None:
    """Write the files that say how the model embeds."""
    steps = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    kept = steps if normalize else steps[:2]
    modules = [
        {"idx": number, "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (name, path) in enumerate(kept)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {flag: mode == pooling for mode, flag in _FLAGS.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))


@functools.cache
def word_tokenizer() -> tokenizers.Tokenizer:
    """One token for each of the words w0, w1, ..., with [CLS] before a text and [SEP] after it."""
    words = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", *(f"w{n}" for n in range(VOCAB_SIZE - 4))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return tokenizer


def reference_vectors(
    folder: Path, texts: Sequence[Sequence[int]], pooling: str, *, normalize: bool = True
) -> list[list[float]]:
    """The vectors of transformers, one text at a time."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return [_vector(model, text, pooling, normalize) for text in texts]


@torch.no_grad()
def _vector(model: Any, text: Sequence[int], pooling: str, normalize: bool) -> list[float]:
    rows = model(input_ids=torch.tensor([list(text)])).last_hidden_state[0]
    pooled = {"cls": rows[0], "mean": rows.mean(0), "last": rows[-1]}[pooling]
    vector = torch.nn.functional.normalize(pooled, dim=0) if normalize else pooled
    return [float(number) for number in vector]
