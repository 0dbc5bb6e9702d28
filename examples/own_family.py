"""A model family of your own: sage-tiny under an architecture that sagellm does not know."""

import json
import shutil
import tempfile
from pathlib import Path

import trio

from sagellm import Graph, ops, register_model_family
from sagellm.graphs.models import Config, Decoder, ModelFamily, read_decoder
from sagellm.graphs.models.config import num_layers
from sagellm.runtime.models.folder import BUILT_IN


def shape(config: Config) -> Decoder:
    """Full attention in every layer, and a norm of each query and key."""
    windows = (None,) * num_layers(config)
    return read_decoder(config, "own", windows=windows, qk_norm=True)


FAMILY = ModelFamily("OwnForCausalLM", shape)


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(BUILT_IN["sage-tiny"], folder, dirs_exist_ok=True)
        file = Path(folder) / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "architectures": ["OwnForCausalLM"]}))
        graph = Graph("g").engine("e", model=folder) >> ops.generate(engine="e")
        async with graph.open() as session:
            answer = await session.generate([{"role": "user", "content": "What is 23 + 45?"}])
            print(answer.text)


if __name__ == "__main__":
    register_model_family(FAMILY)
    trio.run(main)
