"""Tells of prompts that are to be exported layer by layer, while a step computes them."""

import os
from collections.abc import Callable

import trio

from sagellm.backends.layers_done import LayersDone
from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.kv.extent import Extent
from sagellm.runtime.kv.lease import Lease

# A part of its own costs what copying about so much does: smaller ones wait for more layers.
LEAST_PART_BYTES = 2**20

Tell = Callable[[Lease, Extent], None]


class LayerWatch:
    """Of one engine. `tell` hears of leases, and of how much of their prompts is computed.

    `close` it when nothing computes any more: a step that runs rings its bell.
    """

    def __init__(self, block_size: int, layer_bytes: int, tell: Tell) -> None:
        self._block_size = block_size
        self._layer_bytes = layer_bytes  # of one block in one layer
        self._tell = tell
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._batch: Batch | None = None
        self._told: dict[Sequence, int] = {}  # layers of it

    def begin(self, batch: Batch) -> None:
        """It computes from now on."""
        self._batch = None
        self._told.clear()
        if any(sequence.state.hold_kv for sequence in batch.sequences):
            batch.layers_done = LayersDone(self._bell)
            self._batch = batch

    def end(self) -> None:
        """Nothing computes; what is computed now is told of by whoever collects it."""
        self._batch = None

    def close(self) -> None:
        """Nothing happens where it is closed already."""
        if self._bell >= 0:
            trio.lowlevel.notify_closing(self._bell)
            os.close(self._bell)
            self._bell = -1

    async def run(self) -> None:
        """Until closed, or cancelled."""
        while True:
            try:
                await trio.lowlevel.wait_readable(self._bell)
                os.eventfd_read(self._bell)
            except (trio.ClosedResourceError, OSError):  # closed
                return
            self._look()

    def _look(self) -> None:
        batch = self._batch
        if batch is None or batch.layers_done is None:
            return
        num_layers = batch.layers_done.count
        for sequence, query_len in zip(batch.sequences, batch.query_lens, strict=True):
            if sequence.state.hold_kv and sequence.lease is not None and sequence.end is None:
                extent = self._extent(sequence, query_len, num_layers)
                new = (extent.end - extent.num_blocks) * (num_layers - self._told.get(sequence, 0))
                if new * self._layer_bytes >= LEAST_PART_BYTES:
                    self._told[sequence] = num_layers
                    self._tell(sequence.lease, extent)

    def _extent(self, sequence: Sequence, query_len: int, num_layers: int) -> Extent:
        """Of a sequence of which the step computes so many tokens; a block of which only a part is
        computed by then is whole where the prompt ends in it.
        """
        size, num_tokens = self._block_size, sequence.num_computed + query_len
        is_last = query_len == sequence.num_pending
        end = -(-num_tokens // size) if is_last else num_tokens // size
        return Extent(num_blocks=sequence.num_computed // size, end=end, num_layers=num_layers)
