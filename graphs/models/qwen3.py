"""Qwen3: queries and keys are normalised per head before the rotation."""

from sagellm.graphs.models import config as read
from sagellm.graphs.models.config import Config
from sagellm.graphs.models.decoder import Decoder
from sagellm.graphs.models.family import ModelFamily, read_decoder


def _shape(config: Config) -> Decoder:
    sliding = read.flag(config, "use_sliding_window")
    window = read.whole(config, "sliding_window", 4096) if sliding else None
    bias = read.flag(config, "attention_bias")
    return read_decoder(
        {"head_dim": 128, **config},
        "qwen3",
        windows=read.layer_windows(config, window),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )


FAMILY = ModelFamily("Qwen3ForCausalLM", _shape)
