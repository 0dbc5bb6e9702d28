"""Blocks of a prompt that move on their own, while the rest of it is computed."""

import msgspec


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks `first` to `end`, without that one, of a prompt, in the tables of full attention.

    What layers with windows and recurrent states remember changes while the prompt is computed: it
    moves at the end.
    """

    first: int
    end: int

    @property
    def num_blocks(self) -> int:
        return self.end - self.first
