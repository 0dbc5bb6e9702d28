"""The card of a served model, and the sampling parameters of requests, checked for the model."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.protocol.bodies import ChatRequest, CompletionRequest
from sagellm.gateway.protocol.request import Generation
from sagellm.gateway.settings import Settings
from sagellm.graphs.vocabulary import GRAMMARS
from sagellm.runtime.sampling import RANGES, Sampling, sampling_fault
from sagellm.session import Session

_COMPLETION_TOKENS = 16  # default of `max_tokens`, as in the OpenAI API; a chat fills the context
# Fields of requests that are copied to `Sampling` unchanged.
_SAME = (
    "min_tokens",
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "ignore_eos",
    "n",
)


@dataclass(frozen=True, slots=True)
class ModelBounds:
    """The bounds of a model on requests. Token ids are 0 ... `vocab_size` - 1.

    If the model's engine takes text, `vocab_size` is 0, because its tokens are unknown here.
    `max_model_len` counts the tokens of prompt and answer together.
    """

    vocab_size: int
    max_model_len: int

    @property
    def takes_text(self) -> bool:
        return self.vocab_size == 0


def sampling_of(
    request: CompletionRequest | ChatRequest, facts: ModelBounds, num_prompt_tokens: int
) -> Sampling:
    """Return the sampling of a request, for a prompt of `num_prompt_tokens` tokens.

    Raises ApiError (400).
    """
    max_tokens = _max_tokens(request, facts, num_prompt_tokens)
    check_ids("stop_token_ids", request.stop_token_ids, facts)
    bias = {int(token): value for token, value in request.logit_bias.items()}
    check_ids("logit_bias", bias, facts)
    allowed = request.allowed_token_ids or []
    check_ids("allowed_token_ids", allowed, facts)
    same: dict[str, Any] = {name: getattr(request, name) for name in _SAME}
    sampling = Sampling(
        **same,
        max_tokens=max_tokens,
        top_k=max(0, request.top_k),
        logit_bias=bias,
        allowed_token_ids=tuple(sorted(set(allowed))),
        bad_words=tuple(request.bad_words),
        stop=request.stops,
        stop_token_ids=tuple(request.stop_token_ids),
        logprobs=num_logprobs(request),
        prompt_logprobs=_num_prompt_logprobs(request),
    )
    fault = sampling_fault(sampling)
    if fault is not None:
        param, _, what = fault.partition(" ")
        raise wrong(param, what)
    return sampling


def fitted(
    sampling: Sampling,
    request: CompletionRequest | ChatRequest,
    facts: ModelBounds,
    num_prompt_tokens: int,
) -> Sampling:
    """Return the sampling for another prompt of the same request: only `max_tokens` may differ.

    Raises ApiError (400).
    """
    max_tokens = _max_tokens(request, facts, num_prompt_tokens)
    if max_tokens == sampling.max_tokens:
        return sampling
    return msgspec.structs.replace(sampling, max_tokens=max_tokens)


def kept_ids(
    request: Generation, token_ids: tuple[int, ...], facts: ModelBounds
) -> tuple[int, ...]:
    """Return the tokens of a prompt after `truncate_prompt_tokens`.

    The value -1 keeps the most tokens that still leave room for the answer. Raises ApiError (400)
    if the engine takes text.
    """
    limit = request.truncate_prompt_tokens
    if limit is None:
        return token_ids
    if facts.takes_text:
        raise wrong("truncate_prompt_tokens", "is not for an engine that takes text alone")
    if limit < 0:
        limit = max(1, facts.max_model_len - (request.asked_tokens or 1))
    return token_ids[:limit] if request.truncation_side == "right" else token_ids[-limit:]


def check_ids(param: str, token_ids: Iterable[int], facts: ModelBounds) -> None:
    """Raise ApiError (400) for the first id that is not in the vocabulary."""
    if facts.takes_text and any(True for _ in token_ids):  # `token_ids` may have no length
        raise wrong(param, "has token ids; the engine of this model takes text alone")
    unknown = next((token for token in token_ids if not 0 <= token < facts.vocab_size), None)
    if unknown is not None:
        raise wrong(param, f"has token {unknown}; the model knows 0 ... {facts.vocab_size - 1}")


def _max_tokens(
    request: CompletionRequest | ChatRequest, facts: ModelBounds, num_prompt_tokens: int
) -> int:
    """Return the limit of the answer's tokens: the requested one, or a default that fits.

    Raises ApiError (400) if the limit is less than `min_tokens`, or does not fit the context.
    """
    prompt = _prompt_param(request)
    if num_prompt_tokens == 0 and not facts.takes_text:
        raise wrong(prompt, "has 0 tokens; give at least one")
    room = facts.max_model_len - num_prompt_tokens
    if (request.asked_tokens or 1) > room:
        raise _too_long(prompt, num_prompt_tokens, request.asked_tokens, facts)
    default = room if isinstance(request, ChatRequest) else _COMPLETION_TOKENS
    found = request.asked_tokens or min(default, room, int(RANGES["max_tokens"][1]))
    if request.asked_tokens == 0:
        found = 1  # for an echo: engines make at least one token, and the answer hides it
    if request.min_tokens > found:
        raise wrong("min_tokens", f"is {request.min_tokens}, more than max_tokens ({found})")
    return found


def _prompt_param(request: CompletionRequest | ChatRequest) -> str:
    return "messages" if isinstance(request, ChatRequest) else "prompt"


def far_too_long(request: CompletionRequest | ChatRequest, facts: ModelBounds) -> ApiError:
    """Return the error for a prompt that is so long that it was not tokenised to its end."""
    message = f"has more than {facts.max_model_len} tokens"
    return _overflow(_prompt_param(request), message, facts)


def _too_long(prompt: str, num_prompt: int, asked: int | None, facts: ModelBounds) -> ApiError:
    answer = "" if asked is None else f" and max_tokens is {asked}"
    return _overflow(prompt, f"has {num_prompt} tokens{answer}", facts)


def _overflow(param: str, message: str, facts: ModelBounds) -> ApiError:
    # LiteLLM and others know the error by these words of OpenAI and vLLM.
    limit = f"this model's maximum context length is {facts.max_model_len} tokens"
    return wrong(param, f"{message}; {limit}", "context_length_exceeded")


def num_logprobs(request: CompletionRequest | ChatRequest) -> int | None:
    """Return how many most likely tokens the answer shows at each place; None: no logprobs."""
    if isinstance(request, CompletionRequest):
        return request.logprobs
    return (request.top_logprobs or 0) if request.logprobs else None


def _num_prompt_logprobs(request: CompletionRequest | ChatRequest) -> int | None:
    """Return how many logprobs the engine computes for each prompt token; None: none.

    Two fields ask for them: vLLM's `prompt_logprobs`, and `logprobs` with `echo`.
    """
    is_echo = isinstance(request, CompletionRequest) and request.echo
    echoed = num_logprobs(request) if is_echo else None
    asked = [number for number in (request.prompt_logprobs, echoed) if number is not None]
    return max(asked, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The description of a served model for clients. They may use any of its `names`.

    Answers show the first name. `key` is the model's name in a graph of several models.
    """

    names: tuple[str, ...]
    key: str = ""
    root: str
    max_model_len: int
    vocab_size: int
    created: int  # seconds since 1970, as in the OpenAI API
    takes_grammars: bool = False  # whether the engines bind an answer to a grammar
    vector_len: int = 0  # numbers of a vector; 0 for a model that generates

    @property
    def id(self) -> str:
        return self.names[0]

    @property
    def embeds(self) -> bool:
        return self.vector_len > 0

    @property
    def facts(self) -> ModelBounds:
        return ModelBounds(self.vocab_size, self.max_model_len)


def model_cards(session: Session, settings: Settings) -> tuple[ModelCard, ...]:
    """Return the cards of a session's models, in order.

    If the graph has one model, the settings name it; otherwise the graph names the models.
    """
    # `root` is a name and not the folder of the weights: cards must not show paths of this machine.
    models, created = session.models, int(time.time())
    cards = []
    for model in models.all:
        names = model.served.names if models.is_several else settings.served_models
        cards.append(
            ModelCard(
                names=names,
                key=model.key if models.is_several else "",
                root=names[0],
                max_model_len=session.max_model_len_of(model.key),
                vocab_size=model.tokenizer.vocab_size,
                created=created,
                takes_grammars=session.is_able(GRAMMARS, model.key),
                vector_len=session.vector_len_of(model.key),
            )
        )
    return tuple(cards)
