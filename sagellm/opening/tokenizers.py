"""Loads the models of a checked graph for sessions and gateways: tokenizers, names, scopes."""

from hashlib import blake2b

from sagellm.graphs.ir import Graph
from sagellm.graphs.sections import ServedModel, served_models
from sagellm.opening.graph_engines import describe_engine
from sagellm.runtime.models.folder import ModelFolder
from sagellm.runtime.models.tokenizer import RemoteTokenizer, load_tokenizer
from sagellm.session.models import Model, Models


def load_models(graph: Graph) -> Models:
    """Load the tokenizers of a checked graph's models. Raises ModelError, EngineOptionError."""
    return Models(tuple(_loaded(graph, served) for served in served_models(graph)))


def _loaded(graph: Graph, served: ServedModel) -> Model:
    """One model, described by its first engine: the checks refuse engines of other tokenizers."""
    engine = describe_engine(graph, served.engines[0])
    if engine.folder is None:
        return Model(served, RemoteTokenizer(), engine.model, _digest(engine.model))
    return Model(served, load_tokenizer(engine.folder), engine.model, _scope(engine.folder))


def _scope(folder: ModelFolder) -> str:
    """An id of a model folder. The path is part of it: equal configs may have different weights."""
    return _digest(f"{folder.hash} {folder.path}")


def _digest(named: str) -> str:
    return blake2b(named.encode(errors="surrogateescape"), digest_size=8).hexdigest()
