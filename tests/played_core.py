"""Plays a core with policy_sort before one engine, in virtual time and without an engine."""

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sagellm import Graph, ops
from sagellm.extensions import RESOLVER
from sagellm.runtime.core.core import Core
from sagellm.runtime.core.effects import Deliver, Send, WakeAt
from sagellm.runtime.core.events import (
    Arrived,
    Emitted,
    Event,
    Opened,
    Released,
    Reported,
    TimeCame,
)
from sagellm.runtime.feedback import FirstToken
from sagellm.runtime.messages import Request, TokenEvent
from sagellm.runtime.operator import Credit
from sagellm.runtime.plan import plan

NODE = "generate"


@dataclass
class Played:
    """What became of the requests: when each was sent and had its first token, and other ends."""

    sent: list[tuple[float, Request]] = field(default_factory=list)
    first_token_s: dict[str, float] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)  # request id -> finish reason

    @property
    def order(self) -> list[str]:
        return [request.request_id for _, request in self.sent]


def play(
    policy: str,
    requests: Iterable[Request],
    service_s: Callable[[Request], float],
    *,
    slots: int = 1,
    until_s: float = math.inf,
    **options: Any,
) -> Played:
    """Play the requests, in the order of their arrival, until time `until_s`.

    Each of `slots` requests at once takes `service_s(request)` seconds. Its first token comes then,
    and the request ends.
    """
    return _Player(policy, service_s, slots, options).play(list(requests), until_s)


class _Player:
    def __init__(
        self, policy: str, service_s: Callable[[Request], float], slots: int, options: Any
    ) -> None:
        graph = Graph("g").engine("g", model="null", device="null")
        ready = (graph >> ops.policy_sort(policy, **options) >> ops.generate(engine="g")).ir
        self._core = Core(plan(ready, RESOLVER, {"g": 1}))
        self._service_s = service_s
        self._played = Played()
        self._due: list[tuple[float, int, Any]] = []  # time, number, request to end or None
        self._wake_s = math.inf
        self._on(Opened(NODE, 0, Credit(requests=slots, blocks=1e9), 16), 0.0)

    def play(self, requests: list[Request], until_s: float) -> Played:
        waiting = sorted(requests, key=lambda one: one.stamps.arrived_s)[::-1]
        while True:
            arrives_s = waiting[-1].stamps.arrived_s if waiting else math.inf
            ends_s = self._due[0][0] if self._due else math.inf
            now = min(arrives_s, ends_s, self._wake_s)
            if now == math.inf or now > until_s:
                return self._played
            if now == ends_s:
                self._end(heapq.heappop(self._due)[2], now)
            elif now == self._wake_s:
                self._wake_s = math.inf
                self._on(TimeCame(), now)
            else:
                self._on(Arrived(1, (waiting.pop(),)), now)

    def _end(self, request: Request, now: float) -> None:
        self._played.first_token_s[request.request_id] = now
        event = TokenEvent(request_id=request.request_id, token_ids=(7,), finish_reason="length")
        dispatched_s = request.stamps.dispatched_s
        assert dispatched_s is not None
        first = FirstToken(
            node=NODE,
            seconds=now - dispatched_s,
            num_computed_tokens=request.num_uncached_tokens,
            computed_s=now - dispatched_s,
        )
        self._on(Reported(first), now)
        self._on(Emitted(1, NODE, 0, (event,)), now)
        self._on(Released(NODE, 0, *request.key), now)

    def _on(self, event: Event, now: float) -> None:
        for effect in self._core.on(event, now):
            if isinstance(effect, Send):
                assert isinstance(effect.item, Request)
                self._played.sent.append((now, effect.item))
                due = (now + self._service_s(effect.item), len(self._played.sent), effect.item)
                heapq.heappush(self._due, due)
            elif isinstance(effect, WakeAt):
                self._wake_s = effect.at_s
            elif isinstance(effect, Deliver):
                self._note_end(effect.item)

    def _note_end(self, item: Any) -> None:
        if isinstance(item, TokenEvent) and item.finish_reason is not None:
            self._played.ended[item.request_id] = item.finish_reason
