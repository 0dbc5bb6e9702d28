"""Reports of the prefix blocks of a modelled engine, as engines make them."""

from collections.abc import Iterable

from sagellm.runtime.engine.block_model import BlockModel
from sagellm.runtime.messages import EngineReplica
from sagellm.runtime.prefixes import CacheChanged, OnCacheChanged
from sagellm.runtime.simulation.prompts import PromptHasher


class CacheReports:
    """Tells a reader which blocks one replica stores and drops. Without a reader, nothing is kept.

    `block_size`: the tokens of a block of the engine.
    """

    def __init__(self, place: EngineReplica, block_size: int, hasher: PromptHasher) -> None:
        self._hasher = hasher
        self._place = place
        self._block_size = block_size
        self._tell: OnCacheChanged | None = None
        self._epoch = 0
        self._sequence = 0

    def begin(self, blocks: BlockModel, on_change: OnCacheChanged) -> None:
        """Call `on_change` with all blocks now, and with every change at each `flush`."""
        self._tell = on_change
        self._epoch, self._sequence = self._epoch + 1, 0
        blocks.stored.clear()
        blocks.dropped.clear()
        on_change(self._changed(blocks, blocks.keys, (), is_first=True))

    def flush(self, blocks: BlockModel) -> None:
        """Report the changes since the last call."""
        if not blocks.stored and not blocks.dropped:
            return
        if self._tell is not None:
            stored = [key for key in dict.fromkeys(blocks.stored) if blocks.has(key)]
            dropped = [key for key in dict.fromkeys(blocks.dropped) if not blocks.has(key)]
            self._tell(self._changed(blocks, stored, dropped))
        blocks.stored.clear()
        blocks.dropped.clear()

    def _changed(
        self,
        blocks: BlockModel,
        stored: Iterable[bytes],
        dropped: Iterable[bytes],
        *,
        is_first: bool = False,
    ) -> CacheChanged:
        sequence, self._sequence = self._sequence, self._sequence + 1
        return CacheChanged(
            engine=self._place.engine,
            replica=self._place.number,
            epoch=self._epoch,
            sequence=sequence,
            is_first=is_first,
            stored=self._packed(blocks, stored),
            dropped=self._packed(blocks, dropped),
        )

    def _packed(self, blocks: BlockModel, keys: Iterable[bytes]) -> bytes:
        num_parts = blocks.span // self._block_size
        return b"".join(part for key in keys for part in self._hasher.parts(key, num_parts))
