"""Converts a model folder for OpenVINO: python openvino_model.py FOLDER COPY fp16 | int8.

OpenVINO GenAI needs a tokenizer that it can convert. A tokenizer of bytes is enough: prompts are
token ids.
"""

import sys
import tempfile
from pathlib import Path

from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig, OVWeightQuantizationConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def main() -> None:
    folder, copy, precision = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    with tempfile.TemporaryDirectory() as name:
        source = Path(name)
        for file in folder.iterdir():
            if not file.name.startswith("tokenizer"):
                (source / file.name).symlink_to(file)
        _tokenizer().save_pretrained(source)
        main_export(
            model_name_or_path=str(source),
            output=copy,
            task="text-generation-with-past",
            ov_config=_precision(precision),
        )


def _precision(name: str) -> OVConfig:
    if name == "fp16":
        return OVConfig(dtype="fp16")
    return OVConfig(quantization_config=OVWeightQuantizationConfig(bits=8, sym=False))


def _tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate([*letters, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


if __name__ == "__main__":
    main()
