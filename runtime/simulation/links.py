"""Links between pools of KV blocks: a bandwidth, a latency, and contention."""

from collections.abc import Mapping
from dataclasses import dataclass

from sagellm.runtime.messages import EngineReplica
from sagellm.runtime.port import EngineLost
from sagellm.runtime.simulation.timeline import SimulatedFlag, Timeline


@dataclass(slots=True, eq=False)
class _Transfer:
    sender: EngineReplica
    receiver: EngineReplica
    num_bytes: float  # still to be moved
    done: SimulatedFlag
    has_begun: bool = False  # after the latency of the link
    bytes_per_s: float = 0.0
    lost: EngineReplica | None = None


class Links:
    """Every replica has one port, which sends and receives at the speed of its engine.

    The transfers of a port share it equally: a transfer moves at the lower of its shares at the
    sender and at the receiver. Each begins after `latency_s`. `bytes_per_s`: by engine.
    """

    def __init__(
        self, timeline: Timeline, bytes_per_s: Mapping[str, float], *, latency_s: float = 0.0
    ) -> None:
        self.num_bytes = 0.0  # moved so far
        self._timeline = timeline
        self._bytes_per_s = dict(bytes_per_s)
        self._latency_s = latency_s
        self._transfers: list[_Transfer] = []
        self._moved_at_s = 0.0
        self._number = 0  # of the latest plan; earlier plans are out of date

    async def transfer(
        self, sender: EngineReplica, receiver: EngineReplica, num_bytes: float
    ) -> None:
        """Move bytes from one replica to another. A cancellation ends the transfer. Raises
        EngineLost if a replica dies meanwhile.
        """
        transfer = _Transfer(sender, receiver, num_bytes, self._timeline.flag())
        self._transfers.append(transfer)
        if self._latency_s:
            begins_s = self._timeline.now + self._latency_s
            self._timeline.at(begins_s, lambda: self._begin(transfer))
        else:
            self._begin(transfer)
        try:
            await transfer.done.wait()
        finally:
            if transfer in self._transfers:
                self._move()
                self._transfers.remove(transfer)
                self._plan()
        if transfer.lost is not None:
            raise EngineLost(*transfer.lost)

    def drop(self, replica: EngineReplica) -> None:
        """End the transfers of a replica that has died."""
        self._move()
        for transfer in tuple(self._transfers):
            if replica in (transfer.sender, transfer.receiver):
                transfer.lost = replica
                self._transfers.remove(transfer)
                transfer.done.set()
        self._plan()

    def _begin(self, transfer: _Transfer) -> None:
        if transfer in self._transfers:  # it was not cancelled, and both replicas live
            self._move()
            transfer.has_begun = True
            self._plan()

    def _move(self) -> None:
        """Move what the transfers have moved since the last change."""
        seconds = self._timeline.now - self._moved_at_s
        self._moved_at_s = self._timeline.now
        for transfer in self._transfers:
            moved = min(transfer.num_bytes, transfer.bytes_per_s * seconds)
            transfer.num_bytes -= moved
            self.num_bytes += moved

    def _plan(self) -> None:
        """Share the ports, and plan the end of the transfer that ends first."""
        self._number += 1
        number = self._number
        begun = [transfer for transfer in self._transfers if transfer.has_begun]
        senders = [transfer.sender for transfer in begun]
        receivers = [transfer.receiver for transfer in begun]
        first_s = float("inf")
        for transfer in begun:
            sender, receiver = transfer.sender, transfer.receiver
            transfer.bytes_per_s = min(
                self._bytes_per_s[sender.engine] / senders.count(sender),
                self._bytes_per_s[receiver.engine] / receivers.count(receiver),
            )
            first_s = min(first_s, transfer.num_bytes / transfer.bytes_per_s)
        if begun:
            self._timeline.at(self._timeline.now + first_s, lambda: self._end(number))

    def _end(self, number: int) -> None:
        if number != self._number:
            return
        self._move()
        # What is left is less than a millionth of a second: an error of rounding.
        begun = [transfer for transfer in self._transfers if transfer.has_begun]
        ended = [one for one in begun if one.num_bytes <= 1e-6 * one.bytes_per_s]
        for transfer in ended:
            self._transfers.remove(transfer)
            transfer.done.set()
        self._plan()
