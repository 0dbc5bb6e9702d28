"""What a caller is told of a path that there is no route for: the path, and what was meant."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

MAX_PATH_LEN = 120  # characters: a client chooses them
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# Paths of other APIs, and the route here that does what they do.
_ELSEWHERE = {
    "/api/chat": _CHAT,
    "/api/generate": _COMPLETIONS,
    "/api/tags": "/v1/models",
    "/generate": _COMPLETIONS,
    "/v1/embeddings": _CHAT,
    "/v1/messages": _CHAT,
    "/v1/messages/count_tokens": "/tokenize",
    "/v1/responses": _CHAT,
}
_UNSAFE = re.compile(rb"[^A-Za-z0-9/._~%{}:@!$&()*+,;=-]")


def shown(raw_path: bytes) -> str:
    """A path fit for answers and logs: bounded, and anything but plain characters escaped."""
    text = _UNSAFE.sub(lambda found: b"%%%02X" % found[0][0], raw_path[: MAX_PATH_LEN + 1]).decode()
    return text if len(text) <= MAX_PATH_LEN else f"{text[:MAX_PATH_LEN]}..."


def no_such_path(raw_path: bytes, paths: Iterable[str]) -> str:
    """The message of a 404. `paths` are those of the routes."""
    path = shown(raw_path)
    known = _ELSEWHERE.get(path.rstrip("/"))
    if known is not None:
        return f"{path} is not built; this server has {known}"
    plain = [each for each in paths if "{" not in each]
    near = get_close_matches(path.lower(), plain, n=1, cutoff=0.7)
    told = f"there is no such path: {path}"
    return f"{told}; did you mean {near[0]}?" if near else f"{told}; /docs lists those there are"
