"""The models of an open graph: their tokenizers and names, and which one a request means."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b

from sagellm.graphs.ir import Graph
from sagellm.graphs.sections import ServedModel, served_models
from sagellm.graphs.vocabulary import nearest
from sagellm.opening.graph_engines import describe_engine
from sagellm.runtime.models import FolderWarning
from sagellm.runtime.models.folder import ModelFolder
from sagellm.runtime.models.tokenizer import RemoteTokenizer, Tokenizer, load_tokenizer
from sagellm.session.requests import RequestError, encode_prompt


@dataclass(frozen=True, slots=True)
class Model:
    """One model. `root` is what its first engine loads; `scope` differs where models differ."""

    served: ServedModel
    tokenizer: Tokenizer
    root: str
    scope: str

    @property
    def key(self) -> str:
        """Its outlet of `route_model`; empty for the only model of a graph that names none."""
        return self.served.key

    @property
    def takes_text(self) -> bool:
        """Whether its engines encode prompts themselves."""
        return isinstance(self.tokenizer, RemoteTokenizer)


@dataclass(frozen=True, slots=True)
class Models:
    """All models of one graph, at least one. The first serves requests that name none."""

    all: tuple[Model, ...]

    @property
    def default(self) -> Model:
        return self.all[0]

    @property
    def is_several(self) -> bool:
        return len(self.all) > 1

    @property
    def warnings(self) -> tuple[FolderWarning, ...]:
        """What may surprise in the folders of their tokenizers."""
        return tuple(warning for model in self.all for warning in model.tokenizer.warnings)

    def find(self, name: str) -> Model | None:
        """The model that a name, an alias or a key means, and the default for an empty name."""
        if not name:
            return self.default
        return next((m for m in self.all if name == m.key or name in m.served.names), None)

    def named(self, name: str) -> Model:
        """As `find`; the only model of a graph answers to any name. Raises RequestError."""
        found = self.find(name) if self.is_several else self.default
        if found is None:
            known = [each for model in self.all for each in model.served.names]
            close = nearest(name, known)
            hint = f"did you mean {close!r}?" if close else f"there are {', '.join(known)}"
            raise RequestError(f"there is no model {name!r}; {hint}")
        return found

    def encode(self, text: str, name: str = "") -> tuple[int, ...]:
        """The tokens of a prompt that an operator of the graph has rewritten.

        Where the graph knows no model of that name, `route_model` refuses the request later.
        """
        model = (self.find(name) if self.is_several else None) or self.default
        return encode_prompt(model.tokenizer, text)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Have the helper processes of all tokenizers ready for the `with` block."""
        with ExitStack() as stack:
            for tokenizer in {id(each.tokenizer): each.tokenizer for each in self.all}.values():
                stack.enter_context(tokenizer.kept())
            yield


def load_models(graph: Graph) -> Models:
    """The models of a checked graph. Raises ModelError, EngineOptionError."""
    return Models(tuple(_loaded(graph, served) for served in served_models(graph)))


def _loaded(graph: Graph, served: ServedModel) -> Model:
    """The first of its engines speaks for all: the checks let no other tokenizer beside it."""
    engine = describe_engine(graph, served.engines[0])
    if engine.folder is None:
        return Model(served, RemoteTokenizer(), engine.model, _digest(engine.model))
    return Model(served, load_tokenizer(engine.folder), engine.model, _scope(engine.folder))


def _scope(folder: ModelFolder) -> str:
    """Equal for equal folders alone: two of one config may hold different weights."""
    return _digest(f"{folder.hash} {folder.path}")


def _digest(named: str) -> str:
    return blake2b(named.encode(errors="surrogateescape"), digest_size=8).hexdigest()
