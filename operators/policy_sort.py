"""policy_sort: where requests wait. Sends the first of its policy's order that can be taken."""

import math
from dataclasses import dataclass
from functools import partial

import msgspec

from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.operators.policies import find_policy, refuse_unused
from sagellm.operators.policies.options import Options
from sagellm.operators.policies.order import Order, Policy
from sagellm.operators.policies.queue import Entry, Queue, differ
from sagellm.runtime.feedback import (
    CreditChanged,
    HealthChanged,
    QueueChanged,
    RoomChanged,
    Topology,
)
from sagellm.runtime.messages import FinishReason, Request, refusal
from sagellm.runtime.operator import (
    Arrival,
    Draw,
    Input,
    Offer,
    Output,
    Report,
    Setup,
    Signal,
    Step,
    Taken,
    Terminate,
    Wake,
)
from sagellm.runtime.user_function import UserFunction, failing, find_plain_function

SPEC = OpSpec(
    "policy_sort",
    (Port("in", REQUEST),),
    (Port("out", REQUEST),),
    options=Options,
    subscribes=frozenset({"credit", "health", "room", "topology"}),
    signals=frozenset({"cancel", "expire"}),
    queues=True,
)


@dataclass(frozen=True, slots=True)
class PolicySort:
    """Never emits on its own account: it offers, keeps what is not taken, and waits for credit.

    The answer `Taken` to an offer comes before any other input; an offer that is not answered was
    declined, and its items are offered again only once something was taken or credit came back.
    What waits is told upstream whenever it changes, as a `Backlog`.
    """

    name: str
    policy: Policy
    window: int
    function: UserFunction | None = None

    @property
    def initial(self) -> Queue:
        return Queue()

    def on(self, state: Queue, happened: Input, now: float, draw: Draw) -> Step[Queue]:
        match happened:
            case Arrival(item=Request() as request):
                return self._arrive(state, request, now)
            case Taken(item=Request() as request):
                return self._settle(state, state.without_taken(request, now), now)
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

    def _arrive(self, state: Queue, request: Request, now: float) -> Step[Queue]:
        try:
            after = state.with_request(request, self.policy.orders[state.level], now)
        except Exception as error:
            if self.function is None:
                raise
            why = self.function.explain(error)
            end = Terminate(failing(request, why, now=now), error)
            return Step(state, (end,), state.wake_at)
        return self._settle(state, after, now)

    def _settle(
        self,
        before: Queue,
        after: Queue,
        now: float,
        *,
        outputs: tuple[Output, ...] = (),
        anew: bool = False,
    ) -> Step[Queue]:
        """What every change entails: expiries, a change of order, news of the backlog, an offer.
        `anew`: what was declined is offered again.
        """
        wake_at = after.wake_at
        if wake_at is not None and wake_at <= now:
            after, late = after.without_expired(now)
            outputs += _ends(late, "expired", now)
        policy = self.policy
        level = policy.level(after.level, len(after.entries)) if policy.rising else 0
        order = policy.orders[level]
        if level != after.level:
            after, anew = after.at_level(level, order), True
        if differ(after.backlog, before.backlog):
            outputs += (Report(QueueChanged(backlog=after.told(order))),)
        after = after.lapsed(order, now)
        return self._offer(after, () if anew else after.declined, outputs)

    def _offer(
        self, queue: Queue, declined: tuple[Entry, ...], outputs: tuple[Output, ...]
    ) -> Step[Queue]:
        """Offer what is at the head and was not declined."""
        head = queue.entries.head(self.window)
        if head == declined:
            fresh: list[Request] = []
        elif declined:
            known = {entry[2] for entry in declined}
            fresh = [entry[3] for entry in head if entry[2] not in known]
        else:
            fresh = [entry[3] for entry in head]
        if fresh:
            outputs = (*outputs, Offer(tuple(fresh)))
        if head != queue.declined:
            queue = msgspec.structs.replace(queue, declined=head)
        return Step(queue, outputs, queue.wake_at)


def _ends(requests: tuple[Request, ...], reason: FinishReason, now: float) -> tuple[Terminate, ...]:
    return tuple(Terminate(refusal(request, reason, now=now)) for request in requests)


def build(options: Options, setup: Setup) -> PolicySort:
    """Raises ValueError where the options contradict each other."""
    if (options.policy == "own") != (options.function is not None):
        raise ValueError(
            f"{setup.name}: policy: own and function belong together: give both, or neither"
        )
    if options.function is None:
        return PolicySort(setup.name, _named_policy(options, setup), options.window)
    refuse_unused("own", frozenset(), options)
    function = find_plain_function(setup, options.function)
    policy = Policy((Order(partial(_own_rank, function)),))
    return PolicySort(setup.name, policy, options.window, function)


def _own_rank(function: UserFunction, request: Request) -> float:
    """The rank that a user's function gives. Raises WrongResult for what is no number."""
    rank = function(request)
    try:
        number = float(rank)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise function.wanted(rank, "a number")
    return number


def _named_policy(options: Options, setup: Setup) -> Policy:
    try:
        return find_policy(options.policy, options)
    except ValueError as error:
        raise ValueError(f"{setup.name}: {error}") from error
