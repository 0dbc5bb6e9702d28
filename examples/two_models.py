"""Two models in one graph: each reads and writes with its own tokenizer, limits and queue.

The second is made here, so that nothing is downloaded: sage-tiny over a tokenizer that numbers the
bytes backwards. Take a folder or a Hub id of yours instead.
"""

import json
import shutil
import tempfile
from pathlib import Path

import trio
from safetensors.torch import load_file, save_file

from sagellm import Graph, Sampling
from sagellm.runtime.models.folder import resolve_model

NUM_BYTES = 256


def make_backwards(folder: Path) -> Path:
    """Write sage-tiny with its bytes numbered backwards, in the vocabulary and in the weights."""
    source = resolve_model("sage-tiny").path
    assert source is not None
    shutil.copytree(source, folder)
    tokens = json.loads((source / "tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"].items()
    tokens["model"]["vocab"] = {text: NUM_BYTES - 1 - token for text, token in vocab}
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    weights = load_file(source / "model.safetensors")
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & weights.keys():
        weights[name][:NUM_BYTES] = weights[name][:NUM_BYTES].flip(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


async def main() -> None:
    question = [{"role": "user", "content": "What is 23 + 45?"}]
    with tempfile.TemporaryDirectory() as folder:
        second = make_backwards(Path(folder) / "backwards")
        chosen = {"bytes.model": str(second), "bytes.kind": "local"}
        async with Graph.load(Path("examples/two_models.yaml")).open(set=chosen) as models:
            for model in ("sage-tiny", "echo"):
                encoded = models.encode("23", model=model)
                answer = await models.generate(
                    question, sampling=Sampling(max_tokens=16), model=model
                )
                print(f"{model} reads 23 as {encoded.token_ids} and answers {answer.text!r}")


if __name__ == "__main__":
    trio.run(main)
