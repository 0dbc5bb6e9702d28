"""Llama 2, 3 and 3.2 (rope type "llama3")."""

from sagellm.graphs.models import config as read
from sagellm.graphs.models.config import Config
from sagellm.graphs.models.decoder import Decoder
from sagellm.graphs.models.family import ModelFamily, read_decoder


def _shape(config: Config) -> Decoder:
    bias = read.flag(config, "attention_bias")
    return read_decoder(
        config,
        "llama",
        windows=read.same_windows(config, None),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=read.flag(config, "mlp_bias"),
    )


FAMILY = ModelFamily("LlamaForCausalLM", _shape)
