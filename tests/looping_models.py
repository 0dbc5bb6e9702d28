"""A model whose next token depends on the last alone, so that every greedy answer soon repeats."""

from pathlib import Path

from models_on_the_fly import make_model
from safetensors.torch import load_file, save_file


def make_looping_model(folder: Path) -> Path:
    """Attention and feed-forward add nothing: the graph of next tokens has only short cycles."""
    make_model("llama", folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
