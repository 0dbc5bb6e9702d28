"""Leases that no sequence owns: prompts that wait for export, blocks that wait for an import."""

from sagellm.runtime.kv.lease import Fence, Lease
from sagellm.runtime.kv.located import Located
from sagellm.runtime.kv.part import Part
from sagellm.runtime.kv.pool import BlockPool
from sagellm.runtime.kv.storage import Storage
from sagellm.runtime.kv.transfer import PoolSource, PoolTarget
from sagellm.runtime.messages import LeaseRef
from sagellm.runtime.port import StaleLease


class Exchange:
    """One pool's side of all transfers; a fence has at most one lease held and one target here."""

    def __init__(self, pool: BlockPool, storage: Storage, *, engine: str, replica: int) -> None:
        self._pool = pool
        self._storage = storage
        self._engine = engine
        self._replica = replica
        self._held: dict[Fence, Lease] = {}
        self._targets: dict[Fence, PoolTarget] = {}

    def hold(self, lease: Lease, num_tokens: int) -> LeaseRef:
        """Keep the blocks of a computed prompt until they are exported, adopted or cancelled."""
        lease.num_tokens = num_tokens
        if lease.state == "reserved":  # an adopted lease is filled already
            self._pool.advance(lease, "fill")
        self._held[lease.fence] = lease
        return lease.ref(self._engine, self._replica)

    def export(self, ref: LeaseRef) -> PoolSource:
        """The sending side of a held lease. Raises StaleLease."""
        lease = self._pool.find(ref)
        if self._held.get(lease.fence) is not lease:
            raise StaleLease(f"lease {ref.lease_id} is not held for an export")
        self._pool.advance(lease, "send")
        del self._held[lease.fence]
        return PoolSource(self._pool, self._storage, lease, ref)

    async def share_part(self, ref: LeaseRef, part: Part) -> Located:
        """How a part of a prompt that is still being computed is found: its blocks of full
        attention. Raises StaleLease.

        They are its sequence's: what is shared ends with its lease, or where other blocks that hold
        the same take their place.
        """
        lease = self._pool.find(ref)
        blocks = self._pool.full_blocks(lease, part.first, part.end)

        def check() -> None:
            lease.require("reserved", "filled", "sending")
            if self._pool.full_blocks(lease, part.first, part.end) != blocks:
                raise StaleLease(f"lease {ref.lease_id} has other blocks by now")

        return await self._storage.share(blocks, check)

    def target(self, fence: Fence) -> PoolTarget | None:
        """The receiving side that was opened for `fence` and not yet adopted or aborted."""
        return self._targets.get(fence)

    def target_of(self, ref: LeaseRef) -> PoolTarget:
        """The receiving side of that very lease. Raises StaleLease."""
        target = self._targets.get(Fence(ref.request_id, ref.choice, ref.epoch))
        if target is None or target.lease != ref:
            raise StaleLease(f"lease {ref.lease_id} of request {ref.request_id} is gone")
        return target

    def open_target(self, lease: Lease) -> PoolTarget:
        """The receiving side of reserved blocks."""

        def forget() -> None:
            self._targets.pop(lease.fence, None)

        ref = lease.ref(self._engine, self._replica)
        target = PoolTarget(self._pool, self._storage, lease, ref, forget)
        self._targets[lease.fence] = target
        return target

    def adopt(self, ref: LeaseRef, fence: Fence) -> Lease:
        """Make a sequence the owner of a filled lease, held or received. Raises StaleLease."""
        lease = self._pool.find(ref)
        lease.require("filled")
        if lease.fence != fence:
            raise StaleLease(f"lease {ref.lease_id} is of {lease.fence}, not of {fence}")
        held, target = self._held.get(fence), self._targets.get(fence)
        if held is lease:
            del self._held[fence]
        elif target is not None and target.held is lease:
            del self._targets[fence]
        else:
            raise StaleLease(f"lease {ref.lease_id} has an owner already")
        lease.owner = "sequence"
        return lease

    def cancel(self, fence: Fence) -> None:
        """Free what is held or reserved for `fence`."""
        if fence in self._held:
            self._pool.advance(self._held.pop(fence), "cancel")
        if fence in self._targets:
            self._targets[fence].abort()

    def clear(self) -> None:
        """Forget all; the pool ends the leases."""
        self._held.clear()
        self._targets.clear()
