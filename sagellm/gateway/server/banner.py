"""What a server says once it answers: where to call it, under which model name, and how."""

import os
import shlex
from collections.abc import Sequence

import msgspec

from sagellm.gateway.settings import Settings

KEY_VARIABLE = "SAGELLM_API_KEY"
_ANY_HOST = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


def banner(url: str, models: Sequence[str], settings: Settings, *, has_chat: bool) -> str:
    """Lines for people; the last one asks the first model from a shell. No key is in them."""
    reachable, model, named = _reachable(url), models[0], ", ".join(models)
    word = "models" if len(models) > 1 else "model"
    lines = [
        f"sagellm serves {named} at {url}",
        f"  base URL: {reachable}/v1   {word}: {named}",
        f"  {curl(reachable, model, settings, has_chat=has_chat)}",
    ]
    if settings.api_keys and not _is_key(settings):
        lines.insert(2, f"  with a key of yours in {KEY_VARIABLE}:")
    if settings.page:
        lines.insert(2, f"  in a browser: {reachable}/   its API: {reachable}/docs")
    return "\n".join(lines)


def curl(url: str, model: str, settings: Settings, *, has_chat: bool) -> str:
    """A command that asks the model for something short."""
    asked: dict[str, object] = {"model": model, "max_tokens": 64}
    if has_chat:
        path, asked["messages"] = "chat/completions", [{"role": "user", "content": "Hello"}]
    else:
        path, asked["prompt"] = "completions", "Hello"
    parts = ["curl", f"{url}/v1/{path}"]
    if settings.tls_certificate is not None:
        parts += ["--cacert", shlex.quote(str(settings.tls_certificate))]
    if settings.api_keys:
        parts += ["-H", f'"Authorization: Bearer {_key(settings)}"']
    parts += ["-H", "'Content-Type: application/json'"]
    return " ".join([*parts, "-d", shlex.quote(msgspec.json.encode(asked).decode())])


def _key(settings: Settings) -> str:
    """The variable, as the shell expands it; without the name where it is NAME=KEY."""
    return f"${{{KEY_VARIABLE}#*=}}" if _is_named_key(settings) else f"${KEY_VARIABLE}"


def _is_key(settings: Settings) -> bool:
    """Whether what the command sends is a key of this server."""
    given = os.environ.get(KEY_VARIABLE, "")
    return given in settings.api_keys.values() or _is_named_key(settings)


def _is_named_key(settings: Settings) -> bool:
    keys, given = settings.api_keys.values(), os.environ.get(KEY_VARIABLE, "")
    return given not in keys and given.partition("=")[2] in keys


def _reachable(url: str) -> str:
    """The same for a client on this machine, where the server listens at every address."""
    scheme, _, rest = url.partition("://")
    host, _, port = rest.rpartition(":")
    return f"{scheme}://{_ANY_HOST.get(host, host)}:{port}"
