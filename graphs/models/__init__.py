"""Model builders: they turn a parsed config.json into the kernel graph of one forward step."""

from sagellm.graphs.diagnostics import UnsupportedModel
from sagellm.graphs.ir import Graph
from sagellm.graphs.models.config import Config
from sagellm.graphs.models.decoder import Decoder
from sagellm.graphs.models.facts import ModelFacts, facts_of
from sagellm.graphs.models.family import (
    FAMILIES,
    ModelFamily,
    find_family,
    known_architectures,
    read_decoder,
    register_model_family,
)

__all__ = [
    "FAMILIES",
    "Config",
    "Decoder",
    "ModelFacts",
    "ModelFamily",
    "UnsupportedModel",
    "build",
    "check",
    "facts",
    "read_decoder",
    "register_model_family",
]


def build(config: Config) -> Graph:
    """Build the kernel graph of one forward step of a ragged batch, without fusions and types.

    Raises UnsupportedModel for an architecture or a field that sagellm would compute wrongly.
    """
    family = _family(config)
    return family.graph(family.shape(config))


def facts(config: Config) -> ModelFacts:
    """The facts of a model: sizes, limits and memory. Raises UnsupportedModel."""
    family = _family(config)
    shape = family.shape(config)
    return facts_of(config, shape, family.graph(shape))


def check(config: Config) -> None:
    """Raise UnsupportedModel if `facts` would, but without building a graph of all layers."""
    facts_of(config, _family(config).shape(config), Graph("unbuilt", "kernel"))


def _family(config: Config) -> ModelFamily:
    """The family of a config. Raises UnsupportedModel.

    The error does not propose the nearest name: an unknown architecture is not a typing error, and
    the nearest name is a different model.
    """
    named = config.get("architectures")
    name = named[0] if isinstance(named, list | tuple) and named else named
    if not isinstance(name, str):
        fix = "name one of " + ", ".join(known_architectures())
        raise UnsupportedModel("it names no architecture", field="architectures", fix=fix)
    family = find_family(name)
    if family is None:
        known = ", ".join(known_architectures())
        fix = f"use a model of one of {known}, or install a package that offers the architecture"
        cause = f"architecture {name} is not built into sagellm"
        raise UnsupportedModel(cause, field="architectures", fix=fix)
    return family
