"""A transport of your own: KV blocks through files in a folder that all workers see."""

import os
from collections.abc import Sequence
from tempfile import mkstemp

from sagellm import register_transport
from sagellm.runtime.kv.memory import PoolBytes, slices_of
from sagellm.runtime.kv.transport import BlockLocation, CustomBlocks, LeaseCheck, Transport
from sagellm.runtime.kv.transports import TRANSPORTS, TransportKind


class FileTransport(Transport):
    """Every offer is a file. Whoever fetches the blocks removes the file."""

    def __init__(self, pool: PoolBytes, host: str) -> None:
        self.storage, self.layers = pool.storage, range(pool.storage.layout.num_layers)

    async def offer(self, blocks: Sequence[int], check: LeaseCheck) -> CustomBlocks:
        descriptor, path = mkstemp(prefix="kv-")
        with os.fdopen(descriptor, "wb") as file:
            check()  # no `await` follows before the blocks are read: they keep their owner
            file.writelines(self.storage.read(slices_of(blocks), self.layers))
        return CustomBlocks(transport="file", num_blocks=len(blocks), address=path.encode())

    async def fetch(self, source: BlockLocation, blocks: Sequence[int], check: LeaseCheck) -> None:
        assert isinstance(source, CustomBlocks)
        staged = self.storage.stage(slices_of(blocks), self.layers)
        with os.fdopen(os.open(source.address, os.O_RDONLY), "rb") as file:
            check()
            for view in staged.views:
                file.readinto(view)
            staged.commit()
        os.unlink(source.address)


TRANSPORT = TransportKind(FileTransport)
if __name__ == "__main__":  # a package's entry point `file = own_transport` needs no call
    register_transport("file", TRANSPORT)
    print("transports:", ", ".join(TRANSPORTS))
