"""The models of an open graph: tokenizers and names, and the requests built for each model."""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from sagellm.graphs.sections import ServedModel
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.messages import Request
from sagellm.runtime.models import FolderWarning
from sagellm.runtime.models.tokenizer import RemoteTokenizer, Tokenizer
from sagellm.runtime.sampling import Sampling
from sagellm.session.requests import (
    Encoded,
    Prompt,
    RequestError,
    empty_prompt,
    encode,
    encode_bad_words,
    encode_prompt,
    read_sampling,
    read_text,
)


@dataclass(frozen=True, slots=True)
class Model:
    """One model of an open graph.

    `root` is the path or name that the model's first engine loads. `scope` is a prefix of cache
    salts, unique for each model.
    """

    served: ServedModel
    tokenizer: Tokenizer
    root: str
    scope: str

    @property
    def key(self) -> str:
        """The model's outlet of `route_model`; empty if the graph has one unnamed model."""
        return self.served.key

    @property
    def takes_text(self) -> bool:
        """Whether the model's engines encode prompts themselves."""
        return isinstance(self.tokenizer, RemoteTokenizer)

    def read(self, prompt: Prompt) -> Encoded:
        """Return a prompt in the form that the model's engine takes: tokens, text or messages.

        Raises RequestError for an invalid prompt.
        """
        return read_text(prompt) if self.takes_text else encode(self.tokenizer, prompt)

    def fitted(self, request: Request) -> Sampling:
        """Return the sampling of a request, with `max_tokens` cut to the model's own limit.

        Raises RequestError if the prompt leaves no room for an answer.
        """
        # Engines apply only their own limits, which may be larger than the model's.
        sampling, max_model_len = request.sampling, self.served.max_model_len
        if max_model_len is None:
            return sampling
        num_prompt_tokens = len(request.prompt_token_ids)
        room = max_model_len - num_prompt_tokens
        if room < 1:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens; the context limit of the model "
                f"is {max_model_len}, and an answer needs one more"
            )
        return msgspec.structs.replace(sampling, max_tokens=min(sampling.max_tokens, room))

    def with_banned(self, sampling: Sampling) -> Sampling:
        """Return the sampling with bad words as token ids; unchanged if the engine takes text."""
        if self.takes_text:
            return sampling
        banned = encode_bad_words(self.tokenizer, sampling.bad_words)
        return msgspec.structs.replace(
            sampling, bad_words=(), bad_words_token_ids=sampling.bad_words_token_ids + banned
        )


@dataclass(frozen=True, slots=True)
class Models:
    """All models of one graph, at least one. The first is the default."""

    all: tuple[Model, ...]

    @property
    def default(self) -> Model:
        return self.all[0]

    @property
    def is_several(self) -> bool:
        return len(self.all) > 1

    @property
    def warnings(self) -> tuple[FolderWarning, ...]:
        """The warnings about the folders of all tokenizers."""
        return tuple(warning for model in self.all for warning in model.tokenizer.warnings)

    def find(self, name: str) -> Model | None:
        """Return the model with this name, alias or key, or None. An empty name is the default."""
        if not name:
            return self.default
        return next((m for m in self.all if name == m.key or name in m.served.names), None)

    def named(self, name: str) -> Model:
        """Return the model with this name, alias or key. A graph's only model has every name.

        Raises RequestError for an unknown name.
        """
        found = self.find(name) if self.is_several else self.default
        if found is None:
            known = [each for model in self.all for each in model.served.names]
            close = nearest(name, known)
            hint = f"did you mean {close!r}?" if close else f"there are {', '.join(known)}"
            raise RequestError(f"there is no model {name!r}; {hint}")
        return found

    def read(self, prompt: Prompt, sampling: Sampling, fields: Mapping[str, Any]) -> Request:
        """Return a caller's request, with the prompt and the bad words as tokens.

        `fields` are the other fields of the `Request`. Raises RequestError.
        """
        sampling = read_sampling(sampling)
        model = self.named(fields.get("model", ""))
        encoded = model.read(prompt)
        return Request(
            **fields,
            prompt=encoded.text,
            messages=encoded.messages,
            prompt_token_ids=encoded.token_ids,
            sampling=model.with_banned(sampling),
        )

    def choices_of(self, request: Request) -> list[Request]:
        """Return one request for each choice, with its model, `max_tokens` and seed resolved.

        Raises RequestError for an unknown model, an empty prompt, or a prompt that is too long.
        """
        model = self.named(request.model)
        if request.texts:
            return self._texts_of(request, model)
        if not (request.prompt_token_ids or model.takes_text):
            raise empty_prompt()
        if model.takes_text:  # with token ids, no text would reach the engine
            request = msgspec.structs.replace(request, prompt_token_ids=())
        sampling = model.fitted(request)
        if self.is_several:
            # Equal tokens of two models have different KV: the scope keeps their blocks apart.
            salt = f"{model.scope}/{request.salt}"
            request = msgspec.structs.replace(request, model=model.key, salt=salt)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        # All choices, and every engine that computes the request, must sample with one seed (G3).
        sampling = msgspec.structs.replace(sampling, seed=seed)
        return [
            msgspec.structs.replace(request, sampling=sampling, choice=choice)
            for choice in range(sampling.n)
        ]

    def _texts_of(self, request: Request, model: Model) -> list[Request]:
        """Return one request for each text of a request to embed. Raises RequestError."""
        texts, longest = request.texts, model.served.max_model_len
        for token_ids in texts:
            if not token_ids:
                raise RequestError("a text is empty; give at least one token")
            if longest is not None and len(token_ids) > longest:
                raise RequestError(f"a text has {len(token_ids)} tokens; the limit is {longest}")
        key = model.key if self.is_several else request.model
        request = msgspec.structs.replace(request, texts=(), model=key)
        return [
            msgspec.structs.replace(request, prompt_token_ids=token_ids, choice=choice)
            for choice, token_ids in enumerate(texts)
        ]

    def encode(self, text: str, name: str = "") -> tuple[int, ...]:
        """Return the tokens of a prompt whose text an operator of the graph has rewritten.

        For an unknown model name, the default model encodes: `route_model` refuses the request
        later.
        """
        model = (self.find(name) if self.is_several else None) or self.default
        return encode_prompt(model.tokenizer, text)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the helper processes of all tokenizers ready during the `with` block."""
        # Models may share a tokenizer; each tokenizer is entered once.
        with ExitStack() as stack:
            for tokenizer in {id(each.tokenizer): each.tokenizer for each in self.all}.values():
                stack.enter_context(tokenizer.kept())
            yield
