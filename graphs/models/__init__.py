"""Model builders: from a parsed config.json to the kernel graph of one forward step."""

from sagellm.graphs.diagnostics import UnsupportedModel
from sagellm.graphs.ir import Graph
from sagellm.graphs.models import llama, mistral, qwen2, qwen3
from sagellm.graphs.models.config import Config
from sagellm.graphs.models.facts import ModelFacts, facts_of
from sagellm.graphs.models.family import ModelFamily

FAMILIES: dict[str, ModelFamily] = {
    module.FAMILY.architecture: module.FAMILY for module in (llama, mistral, qwen2, qwen3)
}


def build(config: Config) -> Graph:
    """The unfused kernel graph, untyped, of one forward step of a ragged batch.

    Raises UnsupportedModel for an architecture or a field that would not be computed right.
    """
    family = _family(config)
    return family.graph(family.shape(config))


def facts(config: Config) -> ModelFacts:
    """What the rest of the system needs to know of the model. Raises UnsupportedModel."""
    family = _family(config)
    shape = family.shape(config)
    return facts_of(config, shape, family.graph(shape))


def check(config: Config) -> None:
    """Raise UnsupportedModel where `facts` would, without building a graph of all layers."""
    facts_of(config, _family(config).shape(config), Graph("unbuilt", "kernel"))


def _family(config: Config) -> ModelFamily:
    """An unknown architecture is never taken for a slip: the nearest name is another model."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list | tuple) and named else named
    if not isinstance(name, str):
        fix = "name one of " + ", ".join(FAMILIES)
        raise UnsupportedModel("it names no architecture", field="architectures", fix=fix)
    if name not in FAMILIES:
        fix = f"use a model of one of {', '.join(FAMILIES)}"
        cause = f"architecture {name} is not built into sagellm"
        raise UnsupportedModel(cause, field="architectures", fix=fix)
    return FAMILIES[name]


__all__ = ["FAMILIES", "ModelFacts", "UnsupportedModel", "build", "check", "facts"]
