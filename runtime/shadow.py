"""`Shadowed`: a live operator with a shadow, a second operator with other options.

The shadow gets the inputs of the live operator, and what it would have decided is compared with
what the live operator decided. It never acts.

An operator may have these members for a shadow, all optional:

    offered(state) -> requests       of a queue: what it would send, best first
    waiting(state, key) -> request   of a queue: the request of a choice that waits, or None
    followed(before, own, sent) -> state   the state after the live operator sent `sent`; `own`: the
                                     state after the operator's own choice for the same input
    predicted(state, request, now) -> (TTFT in seconds or None, cached prompt tokens) of a request
                                     that is sent as it is, from now
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import replace as replace_field
from functools import partial
from typing import Any, TypeAlias, cast

import msgspec
from msgspec.structs import replace

from sagellm.graphs.diagnostics import Diagnostic, GraphError
from sagellm.graphs.ir import FrozenMap, Node
from sagellm.graphs.vocabulary import SHADOW, OpSpec
from sagellm.runtime.feedback import KINDS, PrefixesChanged, Topology
from sagellm.runtime.messages import ChoiceKey, Request
from sagellm.runtime.notes import SENT, WAITS, Disagreement, decision, disagreement, label_of
from sagellm.runtime.operator import (
    Arrival,
    Draw,
    Emit,
    EmitFirst,
    Input,
    Logic,
    OfferTaken,
    OperatorModule,
    OperatorOutput,
    Setup,
    Signal,
    Step,
    Terminate,
    Wait,
    Wake,
)
from sagellm.runtime.registry import read_options
from sagellm.runtime.user_code import LEAVING, WrongResult, as_error

_LEAST_NAP_S = 1e-3  # a shadow is woken at most so often, whatever it asks for


class ShadowedState(msgspec.Struct, frozen=True):
    """The states of both operators.

    `num_inputs`: those of the live operator, which number its random source. `missing`: choices
    that the shadow has ended and the live operator still has. `noted`: what the core has not taken
    yet. `fault`: the error that switched the shadow off.
    """

    live: Any
    shadow: Any
    num_inputs: int = 0
    live_wake_s: float | None = None
    shadow_wake_s: float | None = None
    missing: frozenset[ChoiceKey] = frozenset()
    num_decisions: int = 0
    noted: tuple[Disagreement, ...] = ()
    fault: Exception | None = None

    def with_live(self, step: Step[Any]) -> "ShadowedState":
        number = self.num_inputs + 1
        return replace(self, live=step.state, num_inputs=number, live_wake_s=step.wake_at)

    def counted(self, found: Disagreement | None) -> "ShadowedState":
        """The state after one more decision was compared."""
        noted = self.noted if found is None else (*self.noted, found)
        return replace(self, num_decisions=self.num_decisions + 1, noted=noted)


# (state, an answer of the live operator) -> the state after the comparison with the shadow's answer
_Judge: TypeAlias = Callable[[ShadowedState, OperatorOutput], ShadowedState]


@dataclass(frozen=True, slots=True)
class Shadowed:
    """A live operator and its shadow, which decides on the same inputs with the same randomness.

    The live operator gets the inputs that it would get without a shadow. An exception of the shadow
    switches it off. Its loads are those of the live decisions; its policy or strategy remembers its
    own decisions.
    """

    spec: OpSpec
    live: Logic[Any]
    shadow: Logic[Any]

    @property
    def initial(self) -> ShadowedState:
        return ShadowedState(self.live.initial, self.shadow.initial)

    @property
    def options(self) -> Any:
        """Those of the live operator, for readers of its bounds."""
        return getattr(self.live, "options", None)

    @property
    def live_subscribes(self) -> frozenset[str]:
        return _subscribes(self.live, self.spec)

    @property
    def subscribes(self) -> frozenset[str]:
        return self.live_subscribes | _subscribes(self.shadow, self.spec)

    def keeps(self, state: ShadowedState, request_id: str) -> bool:
        if _keeps(self.live, state.live, request_id):
            return True
        try:
            return state.fault is None and _keeps(self.shadow, state.shadow, request_id)
        except (Exception, *LEAVING):
            return True  # the shadow raises again on the signal, and is switched off

    def on(
        self, state: ShadowedState, happened: Input, now: float, draw: Draw
    ) -> Step[ShadowedState]:
        step = self._live_step(state, happened, now, draw)
        outputs: tuple[OperatorOutput, ...] = ()
        after = state
        if step is not None:
            if not isinstance(step, Step) or type(step.outputs) is not tuple:
                return step  # the core refuses it
            outputs = step.outputs
            is_same = step.state is state.live and step.wake_at is None
            if type(happened) is Arrival and not outputs and is_same:
                return Step(state)  # the item was lost, which the core reports
            after = state.with_live(step)
        judge: _Judge | None = None
        if after.fault is None:
            try:
                after, judge = self._compared(state, after, outputs, happened, now, draw)
                math.isnan(after.shadow_wake_s or 0.0)  # raises if it is no time
            except (Exception, *LEAVING) as error:
                after = _switched_off(after, error)
        if any(type(one) is EmitFirst for one in outputs):
            outputs = tuple(_wrapped(one, after, judge) for one in outputs)
        return Step(after, outputs, _wake_at(after, now))

    def _live_step(
        self, state: ShadowedState, happened: Input, now: float, draw: Draw
    ) -> Step[Any] | None:
        """The answer of the live operator; None if the input is not for it."""
        if type(happened) is PrefixesChanged and happened.for_shadows:
            return None
        if not _is_for(self.live, self.spec, state.live, happened, state.live_wake_s, now):
            return None
        draw.number = state.num_inputs
        return self.live.on(state.live, happened, now, draw)

    def _compared(
        self,
        before: ShadowedState,
        after: ShadowedState,
        outputs: tuple[OperatorOutput, ...],
        happened: Input,
        now: float,
        draw: Draw,
    ) -> tuple[ShadowedState, _Judge | None]:
        """Give the shadow its input, and compare. Returns the state, and what has to compare the
        placement that the core takes, if any.
        """
        own, taken, wake_s = None, None, after.shadow_wake_s
        if type(happened) is OfferTaken:
            taken = happened.item.key
            after = self._departed(before, after, happened.item)
        if taken in after.missing:
            after = replace(after, missing=after.missing - {taken})
        elif _is_for(self.shadow, self.spec, after.shadow, happened, wake_s, now):
            draw.number, draw.count = before.num_inputs, 0  # the same random numbers again
            own = self.shadow.on(after.shadow, happened, now, draw)
            after = replace(after, shadow=own.state, shadow_wake_s=own.wake_at)
        if self.spec.queues:
            dropped = () if own is None else own.outputs
            return self._synchronised(after, outputs, dropped, now, draw), None
        if own is None:
            return after, None
        if type(happened) is not Arrival or not outputs or type(outputs[0]) is Wait:
            return after, None
        if not own.outputs:
            raise WrongResult("the shadow kept a request that it had to answer")
        first, wanted = outputs[0], own.outputs[0]
        if type(wanted) is EmitFirst:
            item, own_state = next(iter(wanted.choices))
            wanted, after = Emit(item, wanted.outlet), replace(after, shadow=own_state)
        judge = partial(self._judged, before, wanted, happened.item, now)
        return (after, judge) if type(first) is EmitFirst else (judge(after, first), None)

    def _judged(
        self,
        before: ShadowedState,
        shadow: OperatorOutput,
        arrived: Any,
        now: float,
        after: ShadowedState,
        live: OperatorOutput,
    ) -> ShadowedState:
        """The state after the comparison of two answers to the item `arrived`."""
        sent = live.item if type(live) is Emit else None
        item = shadow.item if type(shadow) is Emit else None
        follow = getattr(self.shadow, "followed", None)
        if follow is not None and isinstance(sent, Request):
            after = replace(after, shadow=follow(before.shadow, after.shadow, sent))
        is_route = self.spec.decides == "route"
        decisions = decision(live, is_route=is_route), decision(shadow, is_route=is_route)
        if decisions[0] == decisions[1]:
            return after.counted(None)
        gain_s, gain_tokens = self._gain(before, sent, item, now)
        about = sent or item or arrived  # `admission` sets the objective of a request that it sends
        found = disagreement(arrived.key, decisions, about, label_of(live, shadow))
        return after.counted(replace(found, gain_s=gain_s, gain_tokens=gain_tokens))

    def _gain(
        self, before: ShadowedState, sent: Any, item: Any, now: float
    ) -> tuple[float | None, int]:
        """The predicted gain of the shadow's decision, in seconds of TTFT and in cached tokens."""
        if not isinstance(sent, Request) or not isinstance(item, Request):
            return None, 0
        gain_s, gain_tokens = None, 0
        for operator, state in ((self.shadow, before.shadow), (self.live, before.live)):
            predict = getattr(operator, "predicted", None)
            if predict is None:
                continue
            (live_s, live_tokens), (own_s, own_tokens) = (
                predict(state, one, now) for one in (sent, item)
            )
            if gain_s is None and live_s is not None and own_s is not None:
                gain_s = live_s - own_s
            gain_tokens = gain_tokens or own_tokens - live_tokens
        return gain_s, gain_tokens

    def _departed(self, before: ShadowedState, after: ShadowedState, taken: Any) -> ShadowedState:
        """Compare which request leaves a queue next, of those that there was credit for."""
        live, shadow = self.live, self.shadow
        if not hasattr(live, "offered") or not hasattr(shadow, "offered"):
            return after
        refused = set()
        for one in live.offered(before.live):
            if one.key == taken.key:
                break
            refused.add(one.key)
        offered: Iterator[Request] = iter(shadow.offered(before.shadow))
        first = next((one for one in offered if one.key not in refused), None)
        if first is None or first.key == taken.key:
            return after.counted(None)
        name = first.request_id if not first.choice else f"{first.request_id}/{first.choice}"
        return after.counted(disagreement(taken.key, (SENT, name), first, "other first"))

    def _synchronised(
        self,
        after: ShadowedState,
        outputs: tuple[OperatorOutput, ...],
        own: tuple[OperatorOutput, ...],
        now: float,
        draw: Draw,
    ) -> ShadowedState:
        """The state after the requests that one of two queues has ended are known to both."""
        ended = {one.event.key for one in outputs if type(one) is Terminate}
        dropped = {one.event.key: one.event for one in own if type(one) is Terminate}
        missing = after.missing - ended
        for key, event in dropped.items():
            if key in ended:
                continue
            missing |= {key}
            if event.finish_reason == "refused":
                waiting = getattr(self.live, "waiting", lambda state, key: None)
                about = waiting(after.live, key) or event
                decisions = WAITS, event.code or event.finish_reason
                note = disagreement(key, decisions, about, "would refuse")
                after = replace(after, noted=(*after.noted, note))
        for request_id, choice in sorted(ended - dropped.keys() - after.missing):
            told = self.shadow.on(after.shadow, Signal("cancel", request_id, choice), now, draw)
            after = replace(after, shadow=told.state, shadow_wake_s=told.wake_at)
        return after if missing == after.missing else replace(after, missing=missing)


def _wrapped(output: OperatorOutput, after: ShadowedState, judge: _Judge | None) -> OperatorOutput:
    """An output of the live operator; its placements come with the states of both operators."""
    if type(output) is not EmitFirst:
        return output

    def choices() -> Iterator[tuple[Any, ShadowedState]]:
        for sent, state in output.choices:
            chosen = replace(after, live=state)
            if judge is not None:
                try:
                    chosen = judge(chosen, Emit(sent, output.outlet))
                except (Exception, *LEAVING) as error:
                    chosen = _switched_off(chosen, error)
            yield sent, chosen

    return EmitFirst(choices(), output.outlet, output.hold_s)


def _switched_off(state: ShadowedState, error: BaseException) -> ShadowedState:
    return replace(
        state, shadow=None, shadow_wake_s=None, missing=frozenset(), fault=as_error(error)
    )


def _wake_at(state: ShadowedState, now: float) -> float | None:
    live_s, shadow_s = state.live_wake_s, state.shadow_wake_s
    if shadow_s is None or math.isnan(shadow_s) or math.isinf(shadow_s):
        return live_s
    shadow_s = max(shadow_s, now + _LEAST_NAP_S)
    return shadow_s if live_s is None else min(live_s, shadow_s)


def _subscribes(operator: Any, spec: OpSpec) -> frozenset[str]:
    return frozenset(getattr(operator, "subscribes", spec.subscribes))


def _keeps(operator: Any, state: Any, request_id: str) -> bool:
    keeps = getattr(operator, "keeps", None)
    return keeps is None or bool(keeps(state, request_id))


def _is_for(
    operator: Any, spec: OpSpec, state: Any, happened: Input, wake_s: float | None, now: float
) -> bool:
    """Whether an operator would get an input if it were alone."""
    if type(happened) is Wake:
        return wake_s is not None and wake_s <= now
    if type(happened) is Signal and happened.kind == "forget":
        return _keeps(operator, state, happened.request_id)
    kind = "topology" if type(happened) is Topology else KINDS.get(type(happened))
    return kind is None or kind in _subscribes(operator, spec)


def build_operator(module: OperatorModule, node: Node, setup: Setup) -> Any:
    """Build the operator of a node, with its shadow if it has one.

    Raises what the operator's `build` raises. The mistakes of a shadow are a GraphError at its
    place.
    """
    own = {name: value for name, value in node.attrs.items() if name != SHADOW}
    live = module.build(read_options(module.spec.options, own), setup)
    given = node.attrs.get(SHADOW)
    if given is None:
        return live
    path = ("operators", node.name, SHADOW)
    assert isinstance(given, FrozenMap)
    try:
        shadow = module.build(read_options(module.spec.options, {**own, **given}), setup)
    except GraphError as error:
        moved = (replace_field(one, path=(*path, *one.path[2:])) for one in error.diagnostics)
        raise GraphError(tuple(moved)) from None
    except ValueError as error:
        raise GraphError((Diagnostic("bad-options", path, str(error)),)) from None
    return Shadowed(module.spec, cast(Logic[Any], live), cast(Logic[Any], shadow))
