"""Mistral: Llama's layers without biases, one sliding window over all of them."""

from sagellm.graphs.models import config as read
from sagellm.graphs.models.config import Config
from sagellm.graphs.models.decoder import Decoder
from sagellm.graphs.models.family import ModelFamily, read_decoder

_DEFAULT_WINDOW = 4096  # of transformers, where the field is absent; null is no window


def _shape(config: Config) -> Decoder:
    sliding = config.get("sliding_window", _DEFAULT_WINDOW) is not None
    window = read.whole(config, "sliding_window", _DEFAULT_WINDOW) if sliding else None
    return read_decoder(config, "mistral", windows=read.same_windows(config, window))


FAMILY = ModelFamily("MistralForCausalLM", _shape)
