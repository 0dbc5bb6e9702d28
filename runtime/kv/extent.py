"""How much of a prompt's keys and values there is while it is computed, or moved elsewhere."""

import msgspec


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks `first` .. `end` of a prompt, in layers `first_layer` .. `end_layer`, which are not in
    it; None: to the last layer.
    """

    first: int
    end: int
    first_layer: int = 0
    end_layer: int | None = None

    def layers(self, num_layers: int) -> range:
        """Those of a pool that has so many."""
        return range(self.first_layer, num_layers if self.end_layer is None else self.end_layer)


class Extent(msgspec.Struct, frozen=True, kw_only=True):
    """All layers of the first `num_blocks` blocks of a prompt, and `num_layers` layers of those
    behind them, up to block `end`.
    """

    num_blocks: int = 0
    end: int = 0
    num_layers: int = 0

    def missing(self, there: "Extent") -> Part | None:
        """What there is here and not there, or as much of it as one part can be, and comes next."""
        if there.num_blocks < self.num_blocks:
            end, num_layers = self.num_blocks, None
        elif there.num_blocks == self.num_blocks:
            end, num_layers = self.end, self.num_layers
        else:
            return None
        known = there.num_layers if there.end == end else 0
        if end <= there.num_blocks or (num_layers is not None and num_layers <= known):
            return None
        return Part(first=there.num_blocks, end=end, first_layer=known, end_layer=num_layers)

    def fits(self, part: Part) -> bool:
        """Whether nothing would be missing between this and that part."""
        known = self.num_layers if part.end == self.end else 0
        return part.first <= self.num_blocks and part.first_layer <= known

    def plus(self, part: Part) -> "Extent":
        """This and a part that fits."""
        if part.end_layer is None:
            return whole(max(part.end, self.num_blocks))
        return Extent(num_blocks=self.num_blocks, end=part.end, num_layers=part.end_layer)


def whole(num_blocks: int) -> Extent:
    """So many blocks, with all their layers."""
    return Extent(num_blocks=num_blocks)


NOTHING = whole(0)
