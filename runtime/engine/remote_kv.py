"""An engine in another process whose KV blocks can move."""

from collections.abc import Callable

import trio

from sagellm.runtime.comm.protocol import Advanced, Import, Landing
from sagellm.runtime.engine.prefetching import Prefetcher
from sagellm.runtime.engine.remote import RemoteEngine
from sagellm.runtime.engine.remote_transfer import RemoteSource, RemoteTarget
from sagellm.runtime.kv.lease import Fence
from sagellm.runtime.messages import LeaseRef
from sagellm.runtime.port import EngineFacts, LeaseOffer, LossCause, has_kv_transfer


class RemoteKVEngine(RemoteEngine):
    """`prefetcher`: moves blocks of prompts that are still being computed, if given."""

    def __init__(
        self,
        facts: EngineFacts,
        *,
        name: str,
        replica: int = 0,
        on_change: Callable[[bool], None] = lambda is_up: None,
        prefetcher: Prefetcher | None = None,
    ) -> None:
        super().__init__(facts, name=name, replica=replica, on_change=on_change)
        self._prefetcher = prefetcher

    def cancel(self, request_id: str, choice: int, epoch: int) -> None:
        if self._prefetcher is not None:
            self._prefetcher.forget(Fence(request_id, choice, epoch))
        super().cancel(request_id, choice, epoch)

    def export(self, lease: LeaseRef) -> RemoteSource:
        return RemoteSource(self, lease)

    async def import_(self, offer: LeaseOffer) -> RemoteTarget:
        try:
            answer = await self.ask(lambda call: Import(call=call, offer=offer))
        except trio.Cancelled:
            self.cancel(offer.request_id, offer.choice, offer.epoch)  # it may have had them already
            raise
        assert isinstance(answer, Landing)
        if self._prefetcher is not None:
            self._prefetcher.landing(self, answer.lease)
        return RemoteTarget(self, answer.lease, self._prefetcher)

    def _lose(self, cause: LossCause) -> None:
        super()._lose(cause)
        if self._prefetcher is not None:
            self._prefetcher.lose(self)

    def _hear(self, message: object) -> None:
        if not isinstance(message, Advanced):
            super()._hear(message)
        elif self._prefetcher is not None:
            self._prefetcher.advanced(self, message.lease, message.num_blocks)


def remote_engine(
    facts: EngineFacts,
    *,
    name: str,
    replica: int = 0,
    on_change: Callable[[bool], None] = lambda is_up: None,
    prefetcher: Prefetcher | None = None,
) -> RemoteEngine:
    """The graph's side of an engine with those facts."""
    if not has_kv_transfer(facts):
        return RemoteEngine(facts, name=name, replica=replica, on_change=on_change)
    return RemoteKVEngine(
        facts, name=name, replica=replica, on_change=on_change, prefetcher=prefetcher
    )
