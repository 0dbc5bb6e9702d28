"""Loads the tokenizer, the names and the cache scope of each model of a checked graph."""

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
    """Load one model from its first engine. The checks ensure that all have one tokenizer."""
    engine = describe_engine(graph, served.engines[0])
    if engine.folder is None:  # an engine that takes text, such as a remote one
        return Model(served, RemoteTokenizer(), engine.model, _digest(engine.model))
    return Model(served, load_tokenizer(engine.folder), engine.model, _scope(engine.folder))


def _scope(folder: ModelFolder) -> str:
    """The id of a model folder, from hash and path: equal configs may have different weights."""
    return _digest(f"{folder.hash} {folder.path}")


def _digest(named: str) -> str:
    # Paths that are not UTF-8 contain surrogates.
    return blake2b(named.encode(errors="surrogateescape"), digest_size=8).hexdigest()
