"""How full blocks of tokens are hashed: alike in all engines of one graph, and in its routers.

A hash covers every token from the beginning to the end of its block, and the salt of the tenant. It
is keyed by a secret of the process that opened the graph: nobody else can aim at a collision, or
test from a hash what a prompt was. Worker processes are given the secret over their link. It is in
no log line; a log of decisions whose operators read prefixes has it, as it has the prompts.
"""

import hashlib
import secrets
from array import array
from collections.abc import Iterable

HASH_BYTES = 8  # of a digest, where engines say which blocks they have
_DIGEST_BYTES = 16
_SECRET_BYTES = 32
_SECRET = bytearray(secrets.token_bytes(_SECRET_BYTES))


def secret() -> bytes:
    """The secret of this process."""
    return bytes(_SECRET)


def take_secret(given: bytes) -> None:
    """Take the secret of another process, before any engine is open here. Raises ValueError."""
    if len(given) != _SECRET_BYTES:
        raise ValueError(f"a secret has {_SECRET_BYTES} bytes, not {len(given)}")
    _SECRET[:] = given


def block_content(token_ids: Iterable[int], salt: str | None) -> bytes:
    """What is hashed of a block; `salt`: of a sequence's first block."""
    content = array("I", token_ids).tobytes()
    return content if salt is None else salt.encode(errors="surrogatepass") + content


def block_digest(parent: bytes, content: bytes, key: bytes | bytearray = _SECRET) -> bytes:
    """The digest of a block after the one with digest `parent`, which is empty for the first."""
    return hashlib.blake2b(parent + content, key=key, digest_size=_DIGEST_BYTES).digest()
