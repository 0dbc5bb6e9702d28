"""What the log says of one call that has ended: never a prompt, an answer or a key."""

from collections.abc import Iterator

from starlette.types import Scope

from sagellm.gateway.answers.usage import Tally
from sagellm.gateway.call import Call
from sagellm.gateway.nearest import shown

_METHOD_LEN = 16
_SHORTEST_S = 1e-3  # of which a rate says anything


def call_fields(call: Call, scope: Scope, status: int, now: float) -> dict[str, object]:
    """The fields of its log line: `error` where its client was told of one, and of tokens where any
    were counted. `now` is on the loop's clock.
    """
    fields: dict[str, object] = {
        "request_id": call.request_id,
        "tenant": call.tenant,
        "method": scope["method"][:_METHOD_LEN],
        "path": path_of(scope),
        "status": status,
        "client": client_of(scope),
        "seconds": round(now - call.started_s, 6),
    }
    error: str | None = scope["state"].get("error")
    if error is not None:  # a stream that fails after its first event has status 200
        fields["error"] = error
    tally: Tally | None = scope["state"].get("tally")
    return fields if tally is None else fields | dict(_tokens(call, tally, now))


def path_of(scope: Scope) -> str:
    """As answers show it, without its query, which may hold a key."""
    raw: bytes = scope.get("raw_path") or b""
    return shown(raw.partition(b"?")[0])


def client_of(scope: Scope) -> str:
    """The address that the connection is from: a proxy's where there is one."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def _tokens(call: Call, tally: Tally, now: float) -> Iterator[tuple[str, object]]:
    """Tokens a second count from the first token on, those of all choices together."""
    usage = tally.usage
    if tally.first_s is None or not usage.completion_tokens:
        return
    yield "num_prompt_tokens", usage.prompt_tokens
    yield "num_output_tokens", usage.completion_tokens
    yield "ttft_s", round(tally.first_s - call.started_s, 6)
    if usage.completion_tokens > 1 and now - tally.first_s > _SHORTEST_S:
        yield "tokens_per_s", round((usage.completion_tokens - 1) / (now - tally.first_s), 2)
