"""The kind `openai`: any server that speaks the OpenAI API."""

import os
from dataclasses import dataclass, field

import httpx2
import trio

from sagellm.client.http_calls import read_url
from sagellm.client.responses import ClientError
from sagellm.foreign.foreign_engine import ForeignEngine
from sagellm.foreign.foreign_server import ForeignModel, ForeignServer
from sagellm.graphs.rules.rule import EngineFactsView
from sagellm.graphs.vocabulary import (
    GRAMMARS,
    LOGPROBS,
    RESUME,
    TEXT_IN,
    TEXT_OUT,
    TOKENS_IN,
    TOKENS_OUT,
)
from sagellm.runtime.engine.kinds import EngineDescription, EngineKind, ReplicaPlace
from sagellm.runtime.engine.options import EngineOptionError
from sagellm.runtime.messages import EngineReplica
from sagellm.runtime.models.folder import resolve_model
from sagellm.runtime.port import EngineFacts

_UNKNOWN_LEN = 131_072  # the context limit where neither the graph nor the server gives one
_RETRY_S = 0.5  # between the questions to a server that is not up yet
_TEXT = frozenset({TEXT_IN, TEXT_OUT, RESUME})
_TOKENS = frozenset({TOKENS_IN, TOKENS_OUT, TEXT_OUT, RESUME, LOGPROBS, GRAMMARS})


@dataclass(frozen=True, slots=True)
class OpenAIOptions:
    """The options of kind `openai`. Times are in seconds.

    `urls`: one server for each replica. `model`: the model's name there; empty: the server's first.
    `api_key_env`: the environment variable that holds the key. `tokenizer`: the model folder whose
    tokenizer encodes prompts; then prompts and answers are token ids, which the server must take
    and give (`return_token_ids`, as vLLM and sagellm do). Without it, prompts are text or messages.
    `can_resume`: whether an answer whose server was lost goes on at another one. A chat needs a
    server with `continue_final_message`; None: chats of vLLM, SGLang and sagellm go on.
    `max_num_seqs`: calls at a time to each server. `max_model_len`: the context limit; None: the
    server's own.

    `start_s`: how long to wait for a server that is not up yet. `connect_s`: the timeout of a
    connection. `read_s`: the longest wait for the first and for each later part of an answer.
    `probe_s`: the time between probes of a server that is down. Raises EngineOptionError.
    """

    urls: tuple[str, ...]
    model: str = ""
    api_key_env: str = ""
    tokenizer: str = ""
    can_resume: bool | None = None
    max_num_seqs: int = field(default=64, metadata={"min": 1})
    max_model_len: int | None = field(default=None, metadata={"min": 1})
    start_s: float = field(default=30.0, metadata={"min": 0.0})
    connect_s: float = field(default=5.0, metadata={"min": 1e-3})
    read_s: float = field(default=300.0, metadata={"min": 1e-3})
    probe_s: float = field(default=1.0, metadata={"min": 1e-3})

    def __post_init__(self) -> None:
        if not self.urls:
            raise EngineOptionError("urls: give the URL of at least one server")
        for url in self.urls:
            try:
                read = httpx2.URL(read_url(url))
            except ClientError as error:
                raise EngineOptionError(f"urls: {error.message}") from None
            if read.userinfo:
                raise EngineOptionError(
                    "urls: a URL holds a password; name the variable of a key by api_key_env"
                )
        if self.tokenizer and self.can_resume is not None:
            raise EngineOptionError("can_resume: with a tokenizer, answers always resume")

    @property
    def replicas(self) -> int:
        return len(self.urls)

    @property
    def api_key(self) -> str | None:
        """The key, from the environment. Raises EngineOptionError."""
        if not self.api_key_env:
            return None
        key = os.environ.get(self.api_key_env)
        if not key:
            raise EngineOptionError(
                f"api_key_env: the environment has no {self.api_key_env}; set it to the key"
            )
        return key

    @property
    def capabilities(self) -> frozenset[str]:
        if self.tokenizer:
            return _TOKENS
        return _TEXT - {RESUME} if self.can_resume is False else _TEXT


async def open_openai(options: OpenAIOptions, place: ReplicaPlace) -> ForeignEngine:
    """Ask a server for its model, and return its engine. Raises EngineOptionError."""
    url = read_url(options.urls[place.replica])
    server = ForeignServer(url, options.api_key, connect_s=options.connect_s, read_s=options.read_s)
    try:
        model = await _asked(server, options)
    except BaseException:
        with trio.CancelScope(shield=True):
            await server.aclose()
        raise
    facts = EngineFacts(
        model=model.name,
        max_model_len=options.max_model_len or model.max_model_len or _UNKNOWN_LEN,
        max_num_seqs=options.max_num_seqs,
        capabilities=options.capabilities,
    )
    replica = EngineReplica(place.engine, place.replica)
    return ForeignEngine(
        server,
        facts,
        replica,
        probe_s=options.probe_s,
        can_resume_chats=options.can_resume or model.can_resume_chats,
    )


async def _asked(server: ForeignServer, options: OpenAIOptions) -> ForeignModel:
    """The model of a server. Asks again until `start_s` while the server is not up."""
    begun_s = trio.current_time()
    while True:
        try:
            model = await server.model(options.model)
            if options.tokenizer and not await server.gives_token_ids(model.name):
                raise EngineOptionError(
                    f"tokenizer: {server.url} answers without token ids; leave tokenizer out"
                )
            return model
        except ClientError as error:
            is_answer = error.status is not None and error.status not in (502, 503, 504)
            is_late = trio.current_time() - begun_s >= options.start_s
            if is_answer or is_late or (error.status is None and error.code is None):
                raise EngineOptionError(f"urls: {error.message}") from error
        await trio.sleep(_RETRY_S)


def describe(options: OpenAIOptions) -> EngineDescription:
    """Raises EngineOptionError, ModelError, UnsupportedModel."""
    _ = options.api_key
    folder = resolve_model(options.tokenizer) if options.tokenizer else None
    view = EngineFactsView(
        max_model_len=options.max_model_len,
        replicas=options.replicas,
        capabilities=options.capabilities,
    )
    return EngineDescription(view, options.model or options.urls[0], folder)


KIND = EngineKind(OpenAIOptions, _TEXT | _TOKENS, open_openai, describe)
