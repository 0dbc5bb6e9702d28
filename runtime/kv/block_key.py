"""What a full block is known by: a keyed hash of every token up to its end, inside one salt."""

from collections.abc import Iterable
from typing import NamedTuple

from sagellm.runtime.block_hash import HASH_BYTES, block_content, block_digest


class BlockKey(NamedTuple):
    """`content` is what was hashed behind the parent's digest: token ids and, of a first block, the
    salt. It is compared at each hit, so that a collision would serve nobody else's block.
    """

    digest: bytes
    content: bytes

    @property
    def short(self) -> bytes:
        """The hash by which routers know it."""
        return self.digest[:HASH_BYTES]


def block_key(parent: BlockKey | None, token_ids: Iterable[int], salt: str) -> BlockKey:
    """The key of a block of `token_ids` behind `parent`; None: it is a sequence's first block."""
    content = block_content(token_ids, salt if parent is None else None)
    return BlockKey(block_digest(parent.digest if parent else b"", content), content)
