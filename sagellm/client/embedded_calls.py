"""The calls of an embedded client: checked, rendered and bound to grammars as the gateway does."""

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec

from sagellm.chat_formats import OpenParser, open_plain_parser
from sagellm.client.http_calls import CHAT, encode_json
from sagellm.client.responses import NOT_OFFERED, ClientError
from sagellm.gateway.api_errors import wrong
from sagellm.gateway.gateway import HostedModel
from sagellm.gateway.grammar_checks import invalid_grammar
from sagellm.gateway.http.bound_answers import (
    chat_grammar,
    check_tool_use,
    response_grammar,
)
from sagellm.gateway.protocol.bodies import (
    ChatRequest,
    CompletionRequest,
    read_chat,
    read_completion,
)
from sagellm.gateway.protocol.chat_messages import rendering_of
from sagellm.gateway.protocol.sampling_params import ModelBounds, ModelCard, sampling_of
from sagellm.gateway.protocol.tool_choice import tool_use_of
from sagellm.gateway.settings import Settings
from sagellm.graphs.vocabulary import GRAMMARS
from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.models import HelperUnavailable, TextError
from sagellm.runtime.models.tokenizer import Tokenizer
from sagellm.runtime.sampling import Grammar, Sampling
from sagellm.session import Encoded, Prompt, RequestError

T = TypeVar("T")

_ANY_ID = 1 << 31  # the engine checks which ids its model knows
_FIELDS = ("request_id", "priority", "slo_ttft_s", "timeout_s", "no_queue")
_FORMS = (
    *("response_format", "structured_outputs", "tools", "tool_choice", "parallel_tool_calls"),
    *("reasoning_effort", "include_reasoning", "chat_template_kwargs"),
)
_KNOWN_OPTIONS = frozenset(
    {*Sampling.__struct_fields__, *_FIELDS, *_FORMS}
    | {"max_completion_tokens", "user", "stream_options"}
) - {"grammar", "logprobs", "prompt_logprobs", "bad_words_token_ids"}


class SessionEncoder(Protocol):
    """The members of an open session that `read_call` uses."""

    @property
    def max_model_len(self) -> int: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def is_able(self, capability: str) -> bool: ...

    def encode(self, prompt: Prompt) -> Encoded: ...


class _GrammarsInPlace:
    """Makes grammars in the caller's thread, where the gateway has worker threads."""

    async def run(self, param: str, work: Callable[[], T]) -> T:
        try:
            return work()
        except GrammarError as error:
            raise invalid_grammar(param, str(error)) from None


@dataclass(frozen=True, slots=True)
class _InPlace:
    """The parts that the checks of a gateway need, in this process."""

    settings: Settings = field(default_factory=Settings)
    grammars: _GrammarsInPlace = field(default_factory=_GrammarsInPlace)


_IN_PLACE = _InPlace()


def _finished(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing, without an event loop."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("the coroutine waits")


@dataclass(frozen=True, slots=True)
class SessionCall:
    """The arguments with which a client's call becomes a request to a session.

    `open_parser`: opens the parser of one choice. `shows_reasoning`: the answer has the reasoning.
    """

    prompt: Encoded
    sampling: Sampling
    fields: dict[str, Any]
    open_parser: OpenParser = open_plain_parser
    shows_reasoning: bool = True


def read_call(
    path: str, call: Mapping[str, Any], options: Mapping[str, Any], session: SessionEncoder
) -> SessionCall:
    """Check a call like the gateway does for the same call over HTTP.

    Raises ApiError, RequestError, and ClientError for an option that only a server has.
    """
    body = encode_json({**call, **options})
    request: ChatRequest | CompletionRequest
    request = (read_chat if path == CHAT else read_completion)(body, _IN_PLACE.settings.limits)
    for name in options:  # the gateway's checks came first: they refuse what no server knows
        if name not in _KNOWN_OPTIONS:
            cause = f"{name}: is not served by a graph in this process; serve it over HTTP"
            raise ClientError(cause, status=400, code=NOT_OFFERED, param=name)
    if isinstance(request, ChatRequest):
        return _chat_call(request, session)
    if len(request.prompts) != 1:
        raise wrong("prompt", "is a list of them; give one")
    prompt = session.encode(request.prompts[0])
    grammar = _finished(response_grammar(_IN_PLACE, _hosted(session), request))
    return _session_call(request, prompt, session, grammar)


def _session_call(
    request: ChatRequest | CompletionRequest,
    prompt: Encoded,
    session: SessionEncoder,
    grammar: Grammar | None,
) -> SessionCall:
    facts = ModelBounds(_ANY_ID, session.max_model_len)
    sampling = sampling_of(request, facts, len(prompt.token_ids))
    values = {name: getattr(request, name) for name in _FIELDS}
    fields = {name: value for name, value in values.items() if value is not None}
    return SessionCall(prompt, msgspec.structs.replace(sampling, grammar=grammar), fields)


def _chat_call(request: ChatRequest, session: SessionEncoder) -> SessionCall:
    served = _hosted(session)
    use = tool_use_of(request.tools, request.tool_choice, parallel=request.parallel_tool_calls)
    check_tool_use(served, use)
    prompt = _chat_prompt(request, session)
    grammar = _finished(chat_grammar(_IN_PLACE, served, request, use, prompt.text))
    call = _session_call(request, prompt, session, grammar)
    if not (use.allowed or served.format.has_reasoning):
        return call
    sampling = call.sampling
    if served.format.keeps_special_tokens:
        sampling = msgspec.structs.replace(sampling, skip_special_tokens=False)
    dropped = served.special_tokens if request.skip_special_tokens else {}
    return SessionCall(
        prompt,
        sampling,
        call.fields,
        partial(served.format.open_parser, use, prompt.text, special_tokens=dropped),
        request.include_reasoning,
    )


def _hosted(session: SessionEncoder) -> HostedModel:
    """The model of a session, as the gateway's checks take it."""
    card = ModelCard(
        names=("",),
        root="",
        max_model_len=session.max_model_len,
        vocab_size=_ANY_ID,
        created=0,
        takes_grammars=session.is_able(GRAMMARS),
    )
    return HostedModel(card, session.tokenizer)


def _chat_prompt(request: ChatRequest, session: SessionEncoder) -> Encoded:
    """The prompt of a chat, rendered by the model's template. Raises ApiError, RequestError."""
    tokenizer = session.tokenizer
    try:
        how = rendering_of(request, tokenizer.chat_variables, request.reasoning_effort)
        text = tokenizer.apply_chat_template(request.conversation, how)
        ids = tokenizer.encode(text, add_special_tokens=request.add_special_tokens)
    except (TextError, HelperUnavailable) as error:
        raise RequestError(str(error)) from error
    return Encoded(text, ids)
