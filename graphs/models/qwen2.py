"""Qwen2 and Qwen2.5: biases on queries, keys and values; sliding layers where asked for."""

from sagellm.graphs.models import config as read
from sagellm.graphs.models.config import Config
from sagellm.graphs.models.decoder import Decoder
from sagellm.graphs.models.family import ModelFamily, read_decoder


def _shape(config: Config) -> Decoder:
    sliding = read.flag(config, "use_sliding_window")
    window = read.whole(config, "sliding_window", 4096) if sliding else None
    windows = read.layer_windows(config, window)
    return read_decoder(config, "qwen2", windows=windows, qkv_bias=True)


FAMILY = ModelFamily("Qwen2ForCausalLM", _shape)
