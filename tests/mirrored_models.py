"""A model that answers as sage-tiny does, over a tokenizer that numbers the bytes backwards."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from sagellm.runtime.models.folder import resolve_model

NUM_BYTES = 256
_ROWS = ("model.embed_tokens.weight", "lm_head.weight")  # a row a token


def mirrored(ids: tuple[int, ...]) -> tuple[int, ...]:
    """The token ids of the mirrored model for those of sage-tiny; special tokens are the same."""
    return tuple(NUM_BYTES - 1 - token if token < NUM_BYTES else token for token in ids)


def make_mirrored(folder: Path) -> Path:
    """Write sage-tiny with its bytes numbered backwards, in the vocabulary and in the weights."""
    source = resolve_model("sage-tiny").path
    assert source is not None
    shutil.copytree(source, folder)
    tokens = json.loads((source / "tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"]
    tokens["model"]["vocab"] = {text: mirrored((token,))[0] for text, token in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    weights = load_file(source / "model.safetensors")
    for name in _ROWS:
        if name in weights:
            weights[name][:NUM_BYTES] = weights[name][:NUM_BYTES].flip(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
