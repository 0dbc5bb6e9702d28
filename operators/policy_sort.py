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
    RankContext,
    RequestQueue,
    backlogs_differ,
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
from sagellm.runtime.messages import FinishReason, Request, refusal
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

SPEC = OpSpec(
    "policy_sort",
    (Port("in", REQUEST),),
    (Port("out", REQUEST),),
    options=PolicySortOptions,
    subscribes=frozenset({"cache", "credit", "first_token", "health", "room", "topology"}),
    signals=frozenset({"cancel", "expire"}),
    queues=True,
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
        another operator subscribes to them.
        """
        foresees = any(order.foreseen is not None for order in self.policy.orders)
        wanted = SPEC.subscribes - {"cache"}
        return wanted if foresees or self.ranking is not None else wanted - {"first_token"}

    def on(
        self, state: RequestQueue, happened: Input, now: float, draw: Draw
    ) -> Step[RequestQueue]:
        match happened:
            case Arrival(item=Request() as request):
                return self._arrive(state, request, now)
            case OfferTaken(item=Request() as request):
                after = self._taken(state.without_taken(request, now), request, now)
                return self._settle(state, after, now)
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
                return self._settle(state, after, now, outputs=_ends(ended, reason, now))
            case Wake():
                return self._settle(state, state, now)
        return Step(state, (), state.wake_at)

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
        return queue.with_context(state=state).with_request(
            request, QueueOrder(lambda _: rank), now
        )

    def _taken(self, queue: RequestQueue, request: Request, now: float) -> RequestQueue:
        """The queue after a request was sent. If the policy has a method `taken`, the queue gets
        the policy's new state.
        """
        taken = getattr(self.ranking, "taken", None)
        if taken is None:
            return queue
        return queue.with_context(state=taken(queue.context.state, request, now))

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
        """Finish a change of the queue: end expired requests, change the order with the load,
        report the backlog, and offer requests. `anew`: offer declined requests again.
        """
        wake_at = after.wake_at
        if wake_at is not None and wake_at <= now:  # first, so that no expired request is offered
            after, late = after.without_expired(now)
            outputs += _ends(late, "expired", now)
            wake_at = after.wake_at
        policy = self.policy
        level = policy.level(after.level, len(after.entries)) if policy.rising else 0
        order = after.context.orders[level]
        if level != after.level:
            after, anew = after.at_level(level, order), True
        if backlogs_differ(after.backlog, before.backlog):
            outputs += (Report(QueueChanged(backlog=after.reported(order))),)
        after = after.lapsed(order, now)
        return self._offer(after, () if anew else after.declined, outputs, wake_at)

    def _offer(
        self,
        queue: RequestQueue,
        declined: tuple[QueueEntry, ...],
        outputs: tuple[OperatorOutput, ...],
        wake_at: float | None,
    ) -> Step[RequestQueue]:
        """Offer the first `window` requests of the queue, without those in `declined`."""
        head = queue.entries.head(self.options.window)
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


def _ends(requests: tuple[Request, ...], reason: FinishReason, now: float) -> tuple[Terminate, ...]:
    return tuple(Terminate(refusal(request, reason, now=now)) for request in requests)


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
