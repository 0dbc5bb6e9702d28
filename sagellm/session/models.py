"""The models of an open graph, with tokenizers and names; finds the model of a request."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from sagellm.graphs.sections import ServedModel
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.models import FolderWarning
from sagellm.runtime.models.tokenizer import RemoteTokenizer, Tokenizer
from sagellm.session.requests import RequestError, encode_prompt


@dataclass(frozen=True, slots=True)
class Model:
    """One model. `root` is what the first engine of the model loads. `scope` identifies the folder
    of the model: it is part of the salt, so that two models never share a cached prefix.
    """

    served: ServedModel
    tokenizer: Tokenizer
    root: str
    scope: str

    @property
    def key(self) -> str:
        """The model's outlet of `route_model`; empty where the graph names no models."""
        return self.served.key

    @property
    def takes_text(self) -> bool:
        """Whether the model's engines encode prompts, so that requests carry text."""
        return isinstance(self.tokenizer, RemoteTokenizer)


@dataclass(frozen=True, slots=True)
class Models:
    """All models of one graph, at least one. The first serves requests that name no model."""

    all: tuple[Model, ...]

    @property
    def default(self) -> Model:
        return self.all[0]

    @property
    def is_several(self) -> bool:
        return len(self.all) > 1

    @property
    def warnings(self) -> tuple[FolderWarning, ...]:
        """Warnings about the folders of the tokenizers."""
        return tuple(warning for model in self.all for warning in model.tokenizer.warnings)

    def find(self, name: str) -> Model | None:
        """The model with this name, alias or key; the default model for an empty name."""
        if not name:
            return self.default
        return next((m for m in self.all if name == m.key or name in m.served.names), None)

    def named(self, name: str) -> Model:
        """As `find`, but a graph with one model accepts any name. Raises RequestError."""
        found = self.find(name) if self.is_several else self.default
        if found is None:
            known = [each for model in self.all for each in model.served.names]
            close = nearest(name, known)
            hint = f"did you mean {close!r}?" if close else f"there are {', '.join(known)}"
            raise RequestError(f"there is no model {name!r}; {hint}")
        return found

    def encode(self, text: str, name: str = "") -> tuple[int, ...]:
        """The token ids of a prompt that an operator of the graph has rewritten.

        An unknown name means the default model here; `route_model` refuses such a request later.
        """
        model = (self.find(name) if self.is_several else None) or self.default
        return encode_prompt(model.tokenizer, text)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the helper processes of all tokenizers alive during the `with` block."""
        with ExitStack() as stack:
            for tokenizer in {id(each.tokenizer): each.tokenizer for each in self.all}.values():
                stack.enter_context(tokenizer.kept())
            yield
