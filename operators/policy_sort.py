"""policy_sort: queues requests, and emits them in the order of a policy as credit allows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

import msgspec

from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.operators.policies import find_policy, refuse_unused
from sagellm.operators.policies.order import Policy, PolicySortOptions, QueueOrder, RankingPolicy
from sagellm.operators.policies.request_queue import (
    QueueEntry,
    QueueView,
    RankContext,
    RequestQueue,
    backlogs_differ,
    has_expired,
)
from sagellm.runtime.feedback import (
    CreditChanged,
    FirstToken,
    HealthChanged,
    PrefixesChanged,
    QueueChanged,
    RoomChanged,
    Topology,
)
from sagellm.runtime.forecast import Forecast
from sagellm.runtime.messages import WOULD_WAIT, ChoiceKey, FinishReason, Request, refusal
from sagellm.runtime.operator import (
    Arrival,
    Draw,
    Input,
    Offer,
    OfferTaken,
    OperatorOutput,
    Report,
    Setup,
    Signal,
    Step,
    Terminate,
    Wake,
)
from sagellm.runtime.prefixes import PrefixLookup
from sagellm.runtime.user_function import UserFunction, failure_event, find_plain_function

_LEAST_RETRY_S = 1.0  # the least `retry_after_s` of a refusal

SPEC = OpSpec(
    "policy_sort",
    (Port("in", REQUEST),),
    (Port("out", REQUEST),),
    options=PolicySortOptions,
    subscribes=frozenset({"cache", "credit", "first_token", "health", "room", "topology"}),
    signals=frozenset({"cancel", "expire"}),
    queues=True,
    decides="order",
)


@dataclass(frozen=True, slots=True)
class PolicySort:
    """Offers the first requests of the queue downstream, and keeps them until one is taken.

    If an offered request is taken, `OfferTaken` arrives before any other input; otherwise the offer
    was declined. Declined requests are offered again after another request was taken, or after
    credit was returned. The backlog is reported upstream whenever it changes.

    `ranking`: a policy with a state, which then replaces `policy`. `lookup`: finds the tokens of an
    arriving request that engines have cached, if engines report their prefix blocks.
    """

    name: str
    policy: Policy
    options: PolicySortOptions
    function: UserFunction | None = None
    ranking: RankingPolicy | None = None
    lookup: PrefixLookup | None = None

    @property
    def initial(self) -> RequestQueue:
        state = self.ranking.initial if self.ranking is not None else None
        return RequestQueue(context=RankContext(self._orders(Forecast()), state=state))

    @property
    def subscribes(self) -> frozenset[str]:
        """The feedback that this operator needs. Prefix blocks ("cache") are also used, but only if
        another operator subscribes to them, or if the policy has a true `reads_cache`.
        """
        unused = set()
        if self.ranking is None and not any(order.learns for order in self.policy.orders):
            unused.add("first_token")
        if not getattr(self.ranking, "reads_cache", False):
            unused.add("cache")
        return SPEC.subscribes - unused

    def on(
        self, state: RequestQueue, happened: Input, now: float, draw: Draw
    ) -> Step[RequestQueue]:
        match happened:
            case Arrival(item=Request() as request):
                return self._arrive(state, request, now)
            case OfferTaken(item=Request() as request):
                return self._settle(state, self._taken(state, request, now), now)
            case FirstToken():
                forecast = state.context.forecast.after(happened, now)
                orders = self._orders(forecast)
                return Step(state.with_context(forecast=forecast, orders=orders), (), state.wake_at)
            case PrefixesChanged(engine=engine, index=index):
                indexes = {**state.context.indexes, engine: index}
                return Step(state.with_context(indexes=indexes), (), state.wake_at)
            case RoomChanged(has_room=has_room):
                return self._settle(state, state.with_room(now, has_room=has_room), now)
            case CreditChanged() | HealthChanged() | Topology():
                return self._settle(state, state, now, anew=True)
            case Signal(kind="cancel" | "expire" as kind) as signal:
                after, ended = state.without_signalled(signal, now)
                reason: FinishReason = "cancelled" if kind == "cancel" else "expired"
                after = self._left(after, ended, now)
                return self._settle(state, after, now, outputs=_ends(ended, reason, now))
            case Wake():
                return self._settle(state, state, now)
        return Step(state, (), state.wake_at)

    def offered(self, state: RequestQueue) -> tuple[Request, ...]:
        return tuple(map(_request, state.declined))

    def waiting(self, state: RequestQueue, key: ChoiceKey) -> Request | None:
        found = state.choices.get(key[0], ())
        return next((entry[3] for entry in found if entry[3].key == key), None)

    def _arrive(self, state: RequestQueue, request: Request, now: float) -> Step[RequestQueue]:
        if state.context.indexes and self.lookup is not None:
            request = self.lookup.looked_up(request, state.context.indexes)
        try:
            after = self._ranked(state, request, now)
        except Exception as error:
            if self.function is None:  # no user's function: the executor reports the operator
                raise
            why = self.function.explain(error)
            end = Terminate(failure_event(request, why, now=now), error)
            return Step(state, (end,), state.wake_at)
        return self._settle(state, after, now)

    def _ranked(self, queue: RequestQueue, request: Request, now: float) -> RequestQueue:
        """The queue with a new request at its rank. Raises any error of a user's rank function."""
        context = queue.context
        if self.ranking is None:
            return queue.with_request(request, context.orders[queue.level], now)
        # The rank is fixed at arrival: later changes of the policy's state do not move the request.
        rank, state = self.ranking.rank(context.state, request, now, context.forecast)
        after = queue.with_request(request, QueueOrder(lambda _: rank), now)
        arrived = getattr(self.ranking, "arrived", None)
        if arrived is not None:
            state = arrived(state, after.choices[request.request_id][-1], now)
        return after.with_context(state=state)

    def _taken(self, queue: RequestQueue, request: Request, now: float) -> RequestQueue:
        """The queue after a request was sent."""
        entry = queue.entry_of(request)
        after = queue.without_taken(entry, now)
        taken = getattr(self.ranking, "taken", None)
        if taken is not None:
            after = after.with_context(state=taken(queue.context.state, request, now))
        return self._left(after, (entry,), now, was_taken=True)

    def _left(
        self,
        queue: RequestQueue,
        entries: tuple[QueueEntry, ...],
        now: float,
        *,
        was_taken: bool = False,
    ) -> RequestQueue:
        """The queue after the policy was told of the requests that wait no more."""
        left = getattr(self.ranking, "left", None)
        if left is None or not entries:
            return queue
        state = queue.context.state
        for entry in entries:
            state = left(state, entry, now, was_taken)
        return queue.with_context(state=state)

    def _orders(self, forecast: Forecast) -> tuple[QueueOrder, ...]:
        """The orders of the policy, with prefill times as the forecast predicts them."""

        def prefill_s(request: Request) -> float:
            predicted_s = forecast.prefill_s(request.num_uncached_tokens)
            return self.options.prefill_s(request) if predicted_s is None else predicted_s

        return tuple(order.foreseeing(prefill_s) for order in self.policy.orders)

    def _settle(
        self,
        before: RequestQueue,
        after: RequestQueue,
        now: float,
        *,
        outputs: tuple[OperatorOutput, ...] = (),
        anew: bool = False,
    ) -> Step[RequestQueue]:
        """Finish a change of the queue: end expired requests, change the order with the load, end
        or move late requests, report the backlog, and offer requests. `anew`: offer declined
        requests again.
        """
        if after.wake_at is not None and after.wake_at <= now:  # first: no such request is offered
            after, ended = after.without_expired(now, before.num_arrived)
            after = self._left(after, ended, now)
            outputs += tuple(self._end(after, entry[3], now) for entry in ended)
        policy = self.policy
        level = policy.level(after.level, len(after.entries)) if policy.rising else 0
        order = after.context.orders[level]
        if level != after.level:
            after, anew = after.at_level(level, order), True
        after, late = after.lapsed(order, now, self.options.window)
        if late:
            outputs += tuple(self._refuse_late(after, entry[3], now) for entry in late)
        if backlogs_differ(after.backlog, before.backlog):
            outputs += (Report(QueueChanged(backlog=after.reported(order))),)
        after, head = self._head(after, now)
        times = (after.wake_at, after.lapses_at(order), self._policy_wakes_at(after))
        return self._offer(after, head, () if anew else after.declined, outputs, _earliest(times))

    def _end(self, queue: RequestQueue, request: Request, now: float) -> Terminate:
        """The end of a request that has waited for as long as it may."""
        if has_expired(request, now):
            return Terminate(refusal(request, "expired", now=now))
        retry_after_s = queue.context.forecast.first_token_s(request)
        event = refusal(
            request,
            "refused",
            now=now,
            error=f"{self.name}: {WOULD_WAIT}",
            code="would_wait",
            retry_after_s=max(retry_after_s, _LEAST_RETRY_S),
        )
        return Terminate(event)

    def _refuse_late(self, queue: RequestQueue, request: Request, now: float) -> Terminate:
        error = (
            f"{self.name}: its first token would come after its deadline, however soon it were "
            "sent: try again later, or allow it more time"
        )
        retry_after_s = queue.context.forecast.first_token_s(request)
        event = refusal(
            request,
            "refused",
            now=now,
            error=error,
            code="slo_unreachable",
            retry_after_s=max(retry_after_s, _LEAST_RETRY_S),
        )
        return Terminate(event)

    def _head(self, queue: RequestQueue, now: float) -> tuple[RequestQueue, tuple[QueueEntry, ...]]:
        """The requests to offer, the best first, and the queue with the policy's next state."""
        best = getattr(self.ranking, "best", None)
        if best is None:
            return queue, queue.entries.head(self.options.window)
        context = queue.context
        view = QueueView(queue.entries, now, context.indexes, self.lookup)
        head, state = best(context.state, view, self.options.window)
        return (queue if state is context.state else queue.with_context(state=state)), head

    def _policy_wakes_at(self, queue: RequestQueue) -> float | None:
        """When the policy may choose other requests although nothing has happened."""
        wake_at = getattr(self.ranking, "wake_at", None)
        return None if wake_at is None else wake_at(queue.context.state)

    def _offer(
        self,
        queue: RequestQueue,
        head: tuple[QueueEntry, ...],
        declined: tuple[QueueEntry, ...],
        outputs: tuple[OperatorOutput, ...],
        wake_at: float | None,
    ) -> Step[RequestQueue]:
        """Offer the requests in `head`, without those in `declined`."""
        if head == declined:  # the common case: the change was behind the window
            fresh: tuple[Request, ...] = ()
        elif declined:
            known = {entry[2] for entry in declined}
            fresh = tuple([entry[3] for entry in head if entry[2] not in known])
        else:
            fresh = tuple(map(_request, head))
        if fresh:
            outputs = (*outputs, Offer(fresh))
        if head != queue.declined:
            queue = msgspec.structs.replace(queue, declined=head)
        return Step(queue, outputs, wake_at)


_request: Callable[[QueueEntry], Request] = itemgetter(3)


def _ends(
    entries: tuple[QueueEntry, ...], reason: FinishReason, now: float
) -> tuple[Terminate, ...]:
    return tuple(Terminate(refusal(entry[3], reason, now=now)) for entry in entries)


def _earliest(times: tuple[float | None, ...]) -> float | None:
    return min((time for time in times if time is not None), default=None)


def build(options: PolicySortOptions, setup: Setup) -> PolicySort:
    """Make the operator. Raises ValueError for contradicting options, and GraphError for wrong
    `policy_options`.
    """
    if (options.policy == "own") != (options.function is not None):
        raise ValueError(
            f"{setup.name}: policy: own and function belong together: give both, or neither"
        )
    lookup = PrefixLookup.of(setup)
    if options.function is None:
        found = _named_policy(options, setup)
        if isinstance(found, Policy):
            return PolicySort(setup.name, found, options, lookup=lookup)
        unranked = Policy((QueueOrder(lambda request: 0.0),))
        return PolicySort(setup.name, unranked, options, ranking=found, lookup=lookup)
    refuse_unused("own", frozenset(), options)
    function = find_plain_function(setup, options.function)
    policy = Policy((QueueOrder(partial(_own_rank, function)),))
    return PolicySort(setup.name, policy, options, function, lookup=lookup)


def _own_rank(function: UserFunction, request: Request) -> float:
    """The rank that a user's function returns. Raises WrongResult if it is not a number."""
    rank = function(request)
    try:
        number = float(rank)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise function.wanted(rank, "a number")
    return number


def _named_policy(options: PolicySortOptions, setup: Setup) -> Policy | RankingPolicy:
    try:
        return find_policy(options.policy, options, ("operators", setup.name))
    except GraphError:
        raise
    except ValueError as error:
        raise ValueError(f"{setup.name}: {error}") from error
