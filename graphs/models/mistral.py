"""Mistral: Llama's layers without biases, one sliding window over all of them."""

from sagellm.graphs.models import config as read
from sagellm.graphs.models.config import Config
from sagellm.graphs.models.decoder import Decoder
from sagellm.graphs.models.family import Family, decoder


def _shape(config: Config) -> Decoder:
    sliding = config.get("sliding_window") is not None
    window = read.whole(config, "sliding_window") if sliding else None
    return decoder(config, "mistral", windows=read.same_windows(config, window))


FAMILY = Family("MistralForCausalLM", _shape)
