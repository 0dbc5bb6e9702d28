"""The graph's side of the links to its gateways: a desk for each, where requests come in."""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import trio

from sagellm.gateway.door import Entry, event_of
from sagellm.gateway.errors import ApiError
from sagellm.gateway.gateway import call_of
from sagellm.gateway.portal import Crossing, carry
from sagellm.gateway.processes.link import Link
from sagellm.gateway.processes.messages import (
    Enter,
    Events,
    FromGateway,
    Leave,
    Taken,
    refused,
)
from sagellm.gateway.settings import Streaming
from sagellm.session import Output, Session

_NUM_ROUNDS = 3  # of question and answer with a gateway; by then it would have said what it read


class Gateway(Protocol):
    """The process at the other end of the link."""

    def ask_once(self) -> int:
        """Ask it for a sign of life, unless it owes one; the number of that question."""

    def has_answered(self, number: int) -> bool: ...


class Desk:
    """Takes the requests of one gateway, for as long as `nursery` runs.

    An id that is in use, by a request of another gateway as a rule, is given a suffix, which no
    client sees: it is answered by its gateway. `claimed` has the ids of all desks.
    """

    def __init__(
        self,
        session: Session,
        streaming: Streaming,
        claimed: set[str],
        link: Link[FromGateway],
        nursery: trio.Nursery,
        gateway: Gateway,
    ) -> None:
        self._session = session
        self._streaming = streaming
        self._link = link
        self._nursery = nursery
        self._gateway = gateway
        self._readers: dict[int, _Reader] = {}
        self._claimed = claimed

    def hear(self, message: Enter | Taken | Leave) -> None:
        """What is said of a stream that has ended means nothing any more."""
        if isinstance(message, Enter):
            self._begin(message.stream, message.entry)
            return
        reader = self._readers.get(message.stream)
        if reader is None:
            return
        if isinstance(message, Taken):
            reader.take(message.num_tokens)
        else:
            reader.leave()

    def cancel(self, request_id: str) -> bool:
        """End the request that was asked for by that id; False where there is none."""
        return self._cancel(lambda asked_id: asked_id == request_id)

    def cancel_call(self, call_id: str) -> bool:
        """End the requests of a call; False where it is none of this gateway's."""
        return self._cancel(lambda asked_id: call_of(asked_id) == call_id)

    def _cancel(self, is_meant: Callable[[str], bool]) -> bool:
        meant = [one.request_id for one in self._readers.values() if is_meant(one.asked_id)]
        return any([self._session.cancel(request_id) for request_id in meant])  # noqa: C419 (all)

    def _begin(self, stream: int, entry: Entry) -> None:
        asked_id = entry.request_id
        entry = msgspec.structs.replace(entry, request_id=self._free_id(asked_id))
        reader = _Reader(
            stream, asked_id, entry.request_id, self._link.put, self._forget, self._gateway
        )
        self._readers[stream] = reader
        self._claimed.add(entry.request_id)
        self._nursery.start_soon(carry, self._session, self._streaming, entry, reader)

    def _free_id(self, asked_id: str) -> str:
        found, number = asked_id, 1
        while found in self._claimed or self._session.is_in_use(found):
            number += 1
            found = f"{asked_id}~{number}"
        return found

    def _forget(self, stream: int) -> None:
        reader = self._readers.pop(stream, None)
        if reader is not None:
            self._claimed.discard(reader.request_id)


class _Reader:
    """One request of the gateway, as its events are sent there."""

    def __init__(
        self,
        stream: int,
        asked_id: str,
        request_id: str,
        put: Callable[[msgspec.Struct], None],
        forget: Callable[[int], None],
        gateway: Gateway,
    ) -> None:
        self.asked_id = asked_id
        self.request_id = request_id
        self.crossing: Crossing | None = None
        self.num_taken = 0
        self.is_left = False
        self._stream = stream
        self._put = put
        self._forget = forget
        self._gateway = gateway
        self._num_rounds = 0  # since it took something
        self._asked: int | None = None

    def send(self, outputs: Sequence[Output], end: ApiError | bool) -> None:
        if end:
            self._forget(self._stream)
        if self.is_left:
            return
        if isinstance(end, ApiError):
            self._put(refused(self._stream, end))
        else:
            events = [event_of(output) for output in outputs]
            self._put(Events(self._stream, events, end))

    def take(self, num_tokens: int) -> None:
        self.num_taken += num_tokens
        self._num_rounds, self._asked = 0, None
        if self.crossing is not None and self.crossing.is_held:
            self.crossing.flush()

    def hold(self) -> None:
        """Find out whether the gateway is awake."""
        if self.is_excused() and (self._asked is None or self._gateway.has_answered(self._asked)):
            self._num_rounds += self._asked is not None
            self._asked = self._gateway.ask_once()

    def is_excused(self) -> bool:
        """The gateway may be stopped, or busy: only where it has answered, and has still taken
        nothing, the client is what does not read.
        """
        return self._num_rounds < _NUM_ROUNDS

    def leave(self) -> None:
        self.is_left = True
        if self.crossing is not None:
            self.crossing.scope.cancel()
