"""What must not be in a log line: secrets are taken out, prompts become a length and a hash."""

import re
import secrets
from collections.abc import Iterable, Mapping, MutableMapping
from hashlib import blake2b
from typing import Any

REDACTED = "[redacted]"
_MAX_DEPTH = 8
_SECRET_NAMES = re.compile(
    r"authorization|cookie|password|passwd|secret|credential"
    r"|(^|[_-])(api|admin|salt|access|private|hf)[_-]?(key|token)s?$|^(token|key|keys|bearer)$",
    re.IGNORECASE,
)
_SECRET_TEXTS = re.compile(
    r"(?i:\b(bearer|basic)\s+)[^\s\"',;]+"
    r"|(?<![A-Za-z0-9])(?:sk|pk|hf|ghp|xoxb)[-_][A-Za-z0-9_-]{8,}"
    r"|(?i:((?:api|admin)[-_]?key|token|password)[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;]+"
)
# What users wrote, under whichever name: it is never logged, at any level.
_CONTENT_NAMES = frozenset(
    {"prompt", "prompts", "messages", "content", "text", "input", "inputs", "completion", "output",
     "body", "stop", "token_ids", "prompt_token_ids", "emitted_token_ids", "emitted_text"}
)  # fmt: skip


class Redactor:
    """A structlog processor. `known`: secrets to take out wherever they appear.

    `key` keys the hashes of prompts: equal prompts can be told in one server's log, and nothing
    can be learned of a prompt without the key. One is drawn where none is given.
    """

    def __init__(self, key: bytes = b"", known: Iterable[str] = ()) -> None:
        self._key = key[:64] or secrets.token_bytes(32)
        longest_first = sorted((text for text in known if text), key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def __call__(
        self, logger: object, method: str, line: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        for name in tuple(line):
            line[name] = self.clean(line[name], name)
        return line

    def describe(self, content: object) -> dict[str, object]:
        """What may be said of a prompt: how long it is, and a keyed hash of it."""
        text = content if isinstance(content, str) else repr(content)
        digest = blake2b(text.encode(errors="surrogatepass"), key=self._key, digest_size=8)
        size = len(content) if isinstance(content, str | list | tuple | dict) else len(text)
        return {"len": size, "hash": digest.hexdigest()}

    def clean(self, value: Any, name: str = "", depth: int = 0) -> Any:
        """The value as it may be logged under that name."""
        if value is None or isinstance(value, bool | int | float):
            return REDACTED if value and _SECRET_NAMES.search(name) else value
        if _SECRET_NAMES.search(name):
            return REDACTED
        if name.lower() in _CONTENT_NAMES:
            return self.describe(value)
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, list | tuple | set | frozenset) and depth < _MAX_DEPTH:
            return [self.clean(each, depth=depth + 1) for each in value]
        return self.text(value if isinstance(value, str) else repr(value))

    def text(self, text: str) -> str:
        """The text without what looks like a secret, or is known to be one."""
        return _SECRET_TEXTS.sub(_keep_name, self._known.sub(REDACTED, text))

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> Any:
        if depth >= _MAX_DEPTH:
            return "..."
        return {
            self.text(str(key)): self.clean(each, str(key), depth + 1)
            for key, each in value.items()
        }


def _keep_name(match: re.Match[str]) -> str:
    name = match[1] + " " if match[1] else match[2] or ""
    return name + REDACTED
