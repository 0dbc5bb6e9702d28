"""What a full block is known by: a keyed hash of every token up to its end, inside one salt."""

import hashlib
import secrets
from array import array
from collections.abc import Iterable
from typing import NamedTuple

# Drawn at each start, and told to nobody: a client cannot aim at a collision.
_KEY = secrets.token_bytes(32)
_DIGEST_BYTES = 16


class BlockKey(NamedTuple):
    """`content` is what was hashed behind the parent's digest: token ids and, of a first block, the
    salt. It is compared at each hit, so that a collision would serve nobody else's block.
    """

    digest: bytes
    content: bytes


def block_key(parent: BlockKey | None, token_ids: Iterable[int], salt: str) -> BlockKey:
    """The key of a block of `token_ids` behind `parent`; None: it is a sequence's first block."""
    content = array("I", token_ids).tobytes()
    if parent is None:
        content = salt.encode(errors="surrogatepass") + content
        return BlockKey(_digest(content), content)
    return BlockKey(_digest(parent.digest + content), content)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, key=_KEY, digest_size=_DIGEST_BYTES).digest()
