"""policy_sort: where requests wait. Sends the first of its policy's order that can be taken."""

import math
from dataclasses import dataclass
from functools import partial

import msgspec

from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.operators.policies import find_policy, refuse_unused
from sagellm.operators.policies.options import Options
from sagellm.operators.policies.order import Order, Policy
from sagellm.operators.policies.queue import Queue
from sagellm.runtime.feedback import CreditChanged, HealthChanged, QueueChanged, Topology
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
    subscribes=frozenset({"credit", "health", "topology"}),
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
        state = state.at(now)
        match happened:
            case Arrival(item=Request() as request):
                return self._arrive(state, request, now)
            case Taken(item=Request() as request):
                return self._settle(state, state.without_taken(request), now)
            case CreditChanged() | HealthChanged() | Topology():
                return self._settle(state, msgspec.structs.replace(state, declined=()), now)
            case Signal(kind="cancel" | "expire" as kind) as signal:
                after, ended = state.without_signalled(signal)
                reason: FinishReason = "cancelled" if kind == "cancel" else "expired"
                return self._settle(state, after, now, _ends(ended, reason, now))
            case Wake():
                return self._settle(state, state, now)
        return Step(state, (), state.wake_at)

    def _arrive(self, state: Queue, request: Request, now: float) -> Step[Queue]:
        try:
            after = state.with_request(request, self.policy.orders[state.level])
        except Exception as error:
            if self.function is None:
                raise
            why = self.function.explain(error)
            end = Terminate(failing(request, why, now=now), error)
            return Step(state, (end,), state.wake_at)
        return self._settle(state, after, now)

    def _settle(
        self, before: Queue, after: Queue, now: float, outputs: tuple[Output, ...] = ()
    ) -> Step[Queue]:
        """What every change entails: expiries, a change of order, news of the backlog, an offer."""
        if after.wake_at is not None and after.wake_at <= now:
            after, late = after.without_expired(now)
            outputs += _ends(late, "expired", now)
        level = self.policy.level(after.level, len(after.entries))
        if level != after.level:
            after = after.at_level(level, self.policy.orders[level])
        if after.backlog != before.backlog:
            outputs += (Report(QueueChanged(backlog=after.told(self.policy.orders[level]))),)
        return self._offer(after.lapsed(self.policy.orders[level], now), outputs, now)

    def _offer(self, queue: Queue, outputs: tuple[Output, ...], now: float) -> Step[Queue]:
        head = queue.entries.head(self.window)
        declined = queue.declined
        if head == declined:
            return Step(queue, outputs, queue.wake_at)
        if declined:
            known = {entry[2] for entry in declined}
            fresh = tuple([entry[3] for entry in head if entry[2] not in known])
        else:
            fresh = tuple([entry[3] for entry in head])
        if fresh:
            outputs += (Offer(fresh),)
        return Step(msgspec.structs.replace(queue, declined=head), outputs, queue.wake_at)


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
