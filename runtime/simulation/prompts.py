"""Prompts of a trace, of which lengths and shared blocks are known: tokens are made on demand."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import overload

from sagellm.runtime.messages import Request
from sagellm.runtime.prefixes import HASH_BYTES, BlockHashes, Hasher, PromptHashes

_VOCABULARY = 256  # token ids of simulated prompts lie below: every model has these
_NO_KEY = bytes(HASH_BYTES)
_KEY = bytes(32)  # no secret: equal simulations have equal hashes
_MASK = (1 << 8 * HASH_BYTES) - 1


class TracePrompt(Sequence[int]):
    """`length` tokens, made when they are read. Equal arguments give equal tokens.

    Each of `block_ids` stands for `block_len` tokens: prompts whose first block ids are equal share
    a prefix. Further tokens follow from `number`, the number of the request in its trace.
    """

    __slots__ = ("block_ids", "block_len", "length", "number")

    def __init__(
        self, number: int, length: int, block_ids: Sequence[int] = (), block_len: int = 512
    ) -> None:
        self.number = number
        self.length = length
        self.block_ids = tuple(block_ids[: length // block_len])  # a part of a block is not shared
        self.block_len = block_len

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...
    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        if isinstance(index, slice):
            return tuple(map(self._token, range(self.length)[index]))
        return self._token(range(self.length)[index])

    def __iter__(self) -> Iterator[int]:
        return map(self._token, range(self.length))

    def __add__(self, other: tuple[int, ...]) -> tuple[int, ...]:
        return (*self, *other)

    def _token(self, position: int) -> int:
        block, offset = divmod(position, self.block_len)
        if block < len(self.block_ids):
            return (self.block_ids[block] * 31 + offset) % _VOCABULARY
        return (self.number * 127 + position) % _VOCABULARY


class PromptHasher(Hasher):
    """Hashes the tokens of prompts, as engines do: a replay of the decisions finds equal hashes."""

    def __init__(self) -> None:
        super().__init__(_KEY)
        self._parts: dict[bytes, tuple[bytes, ...]] = {}  # key of a block -> hashes of its parts

    def keys(self, prompt: TracePrompt, block_size: int) -> tuple[bytes, ...]:
        """A key for each block of a prompt that others may share. Equal keys mean equal tokens up
        to the end of the block. `block_size`: the tokens of a block of the engine.
        """
        # One token more, because the hashes of a prompt leave a block out that its last token ends.
        hashes, found = PromptHashes((*prompt, 0), "", block_size, self.key), []
        num_parts = prompt.block_len // block_size
        for block in range(len(prompt.block_ids)):
            parts = tuple(hashes[block * num_parts + part] for part in range(num_parts))
            self._parts[parts[-1]] = parts
            found.append(parts[-1])
        return tuple(found)

    def parts(self, key: bytes, num_parts: int) -> tuple[bytes, ...]:
        """The hashes of the blocks of the engine that hold the block of a key."""
        return self._parts[key]


class TraceHasher(PromptHasher):
    """Hashes the blocks of `TracePrompt` by their block ids, without making their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: dict[tuple[bytes, int], bytes] = {}  # (key of the parent, block id) -> key
        self._latest: tuple[object, tuple[bytes, ...]] = (None, ())

    def hashes(self, request: Request, block_size: int) -> BlockHashes:
        prompt = request.prompt_token_ids
        if not isinstance(prompt, TracePrompt):
            return super().hashes(request, block_size)
        return TraceHashes(prompt, self.keys(prompt, block_size), block_size)

    def keys(self, prompt: TracePrompt, block_size: int) -> tuple[bytes, ...]:
        if self._latest[0] is prompt:
            return self._latest[1]
        known, key, found = self._keys, _NO_KEY, []
        for block_id in prompt.block_ids:
            pair = key, block_id
            following = known.get(pair)
            if following is None:
                content = key + str(block_id).encode()
                following = hashlib.blake2b(content, digest_size=HASH_BYTES).digest()
                known[pair] = following
            found.append(following)
            key = following
        self._latest = prompt, tuple(found)
        return self._latest[1]

    def parts(self, key: bytes, num_parts: int) -> tuple[bytes, ...]:
        return tuple(_part(key, part, num_parts) for part in range(num_parts))


def _part(key: bytes, index: int, num_parts: int) -> bytes:
    """The hash of part `index` of a block of a trace; the last part has the key of the block."""
    if index == num_parts - 1:
        return key
    return ((int.from_bytes(key, "little") + index + 1) & _MASK).to_bytes(HASH_BYTES, "little")


class TraceHashes:
    """The hashes of the blocks of a prompt, in an engine with blocks of `block_size` tokens."""

    __slots__ = ("_keys", "_num_parts", "_number", "num_blocks")

    def __init__(self, prompt: TracePrompt, keys: tuple[bytes, ...], block_size: int) -> None:
        self.num_blocks = max(0, len(prompt) - 1) // block_size
        self._keys = keys
        self._num_parts = max(1, prompt.block_len // block_size)
        self._number = prompt.number

    def __getitem__(self, index: int) -> bytes:
        if index >= self.num_blocks:
            raise IndexError(index)
        block, part = divmod(index, self._num_parts)
        if block < len(self._keys):
            return _part(self._keys[block], part, self._num_parts)
        content = f"{self._number}/{index}".encode()  # nobody shares it
        return hashlib.blake2b(content, digest_size=HASH_BYTES).digest()
