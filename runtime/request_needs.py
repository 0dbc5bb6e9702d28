"""What a request needs of its engine, beyond what its operator does."""

from collections.abc import Callable

from sagellm.graphs.vocabulary import LOGPROBS, RESUME, TOKENS_IN
from sagellm.runtime.messages import ENGINE_FAILED, Request, Sampling
from sagellm.runtime.port import EngineFacts, EngineRefusal


def _asks_logprobs(request: Request) -> bool:
    sampling = request.sampling
    return sampling.logprobs is not None or sampling.prompt_logprobs is not None


def _names_tokens(request: Request) -> bool:
    sampling: Sampling = request.sampling
    return bool(
        sampling.logit_bias
        or sampling.stop_token_ids
        or sampling.allowed_token_ids
        or sampling.bad_words_token_ids
    )


# Capability -> who needs it, why a request is refused without it, and the code of that.
NEEDS: dict[str, tuple[Callable[[Request], bool], str, str]] = {
    LOGPROBS: (
        _asks_logprobs,
        "the engine gives no log probabilities; ask for none",
        "bad_request",
    ),
    TOKENS_IN: (
        _names_tokens,
        "the engine knows no token ids; leave out logit_bias, stop_token_ids, allowed_token_ids "
        "and bad_words_token_ids",
        "bad_request",
    ),
    RESUME: (
        lambda request: request.num_emitted > 0,
        "the engine that answered was lost, and none of its kind can go on with an answer",
        ENGINE_FAILED,
    ),
}


def check_needs(request: Request, facts: EngineFacts) -> None:
    """Raise EngineRefusal where a request asks for what an engine with those facts cannot do."""
    for capability in NEEDS.keys() - facts.capabilities:
        is_needed, why, code = NEEDS[capability]
        if is_needed(request):
            raise EngineRefusal(why, code)
