"""Blocks of a prompt that move on their own, while the rest of it is computed."""

import msgspec


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks `first` to `end`, without that one, of a prompt; all their layers."""

    first: int
    end: int

    @property
    def num_blocks(self) -> int:
        return self.end - self.first
