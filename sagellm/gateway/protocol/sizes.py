"""Checks that need the gateway's limits, or two fields at once."""

from sagellm.gateway.failure import ApiError, wrong
from sagellm.gateway.protocol.request import Generation
from sagellm.gateway.settings import Limits


def check_generation(request: Generation, limits: Limits) -> None:
    """Raise ApiError (400; 404 for the model) for what is too long, too many or contradictory."""
    check_model_name(request.model, limits)
    at_most("n", request.n, limits.num_choices)
    at_most("logit_bias", len(request.logit_bias), limits.num_logit_bias, "entries")
    _check_stops(request, limits)
    _check_pairs(request)


def check_model_name(name: str | None, limits: Limits) -> None:
    """A name that is too long is the name of no model."""
    if name is not None and len(name) > limits.model_name_len:
        message = f"model: there is none with a name of {len(name)} characters"
        raise ApiError(404, message, param="model", code="model_not_found")


def at_most(param: str, number: int, limit: int, unit: str = "") -> None:
    """Raise ApiError (400) with both numbers."""
    if number > limit:
        what = f"has {number} {unit}" if unit else f"is {number}"
        raise wrong(param, f"{what}; the limit is {limit}")


def _check_stops(request: Generation, limits: Limits) -> None:
    at_most("stop", len(request.stops), limits.num_stop, "strings")
    for text in request.stops:
        at_most("stop", len(text.encode()), limits.stop_bytes, "bytes in one string")


def _check_pairs(request: Generation) -> None:
    asked = request.max_tokens, request.max_completion_tokens
    if None not in asked and asked[0] != asked[1]:
        raise wrong("max_tokens", f"is {asked[0]}, but max_completion_tokens is {asked[1]}")
    if request.truncate_prompt_tokens == 0:
        raise wrong("truncate_prompt_tokens", "is 0; it must be 1 or more, or -1 for the context")
