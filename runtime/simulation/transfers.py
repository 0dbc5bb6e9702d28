"""The two ends of a transfer of KV blocks between simulated engines."""

from typing import Protocol

from sagellm.runtime.messages import EngineReplica, LeaseRef
from sagellm.runtime.port import KVSource, StaleLease


class TransferringEngine(Protocol):
    """The part of an engine that the ends of a transfer use."""

    @property
    def place(self) -> EngineReplica: ...

    def free(self, lease: LeaseRef) -> None: ...

    def abort(self, lease: LeaseRef) -> None: ...

    def has_target(self, lease: LeaseRef) -> bool: ...

    async def receive(self, sender: EngineReplica, lease: LeaseRef) -> None: ...


class SimulatedSource:
    """The sending side of a transfer."""

    def __init__(self, engine: TransferringEngine, lease: LeaseRef) -> None:
        self.engine = engine
        self.lease = lease

    def release(self) -> None:
        self.engine.free(self.lease)


class SimulatedTarget:
    """The receiving side of a transfer."""

    def __init__(self, engine: TransferringEngine, lease: LeaseRef) -> None:
        self.lease = lease
        self._engine = engine

    async def receive(self, source: KVSource) -> None:
        """Wait until the link has moved all blocks. Raises StaleLease."""
        assert isinstance(source, SimulatedSource)
        try:
            await self._engine.receive(source.engine.place, source.lease)
        except BaseException:
            self.abort()
            raise
        if not self._engine.has_target(self.lease):
            raise StaleLease(f"the reservation of request {self.lease.request_id} is gone")

    def abort(self) -> None:
        self._engine.abort(self.lease)
