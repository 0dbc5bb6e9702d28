"""How operators hand requests to engines: needs, held requests, leases, stamps and phases."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from sagellm.graphs.vocabulary import LOGPROBS, RESUME, TOKENS_IN
from sagellm.runtime.feedback import FirstToken
from sagellm.runtime.messages import (
    ENGINE_FAILED,
    ChoiceKey,
    Item,
    Prefilled,
    Request,
    Stamps,
    TokenEvent,
    refusal,
)
from sagellm.runtime.operator import Context, Signal
from sagellm.runtime.port import Engine, EngineFacts, EngineRefusal
from sagellm.runtime.sampling import Sampling


def _asks_logprobs(request: Request) -> bool:
    sampling = request.sampling
    return sampling.logprobs is not None or sampling.prompt_logprobs is not None


def _names_tokens(request: Request) -> bool:
    sampling: Sampling = request.sampling
    return bool(
        sampling.logit_bias
        or sampling.stop_token_ids
        or sampling.allowed_token_ids
        or sampling.bad_words_token_ids
    )


# Capability -> whether a request needs it, and the message and code of a refusal without it.
NEEDS: dict[str, tuple[Callable[[Request], bool], str, str]] = {
    LOGPROBS: (
        _asks_logprobs,
        "the engine gives no log probabilities; ask for none",
        "bad_request",
    ),
    TOKENS_IN: (
        _names_tokens,
        "the engine knows no token ids; leave out logit_bias, stop_token_ids, allowed_token_ids "
        "and bad_words_token_ids",
        "bad_request",
    ),
    RESUME: (
        lambda request: request.num_emitted > 0,
        "the engine that answered was lost, and none of its kind can go on with an answer",
        ENGINE_FAILED,
    ),
}


def check_needs(request: Request, facts: EngineFacts) -> None:
    """Raise EngineRefusal where a request needs a capability that the engine lacks."""
    for capability in NEEDS.keys() - facts.capabilities:
        is_needed, why, code = NEEDS[capability]
        if is_needed(request):
            raise EngineRefusal(why, code)


@dataclass(slots=True)
class _HeldRequest:
    """A request and what was emitted of it: token ids, or texts where the engine gives no ids."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    texts: list[tuple[str, int]] = field(default_factory=list)  # each with its number of tokens


class HeldRequests:
    """The requests that one operator has in its engine, each with what was emitted of it."""

    def __init__(self) -> None:
        self._requests: dict[ChoiceKey, _HeldRequest] = {}
        self._choices: dict[str, dict[int, None]] = {}  # by request id, for signals

    def add(self, request: Request) -> None:
        self._requests[request.key] = _HeldRequest(request)
        self._choices.setdefault(request.request_id, {})[request.choice] = None

    def get(self, key: ChoiceKey) -> Request | None:
        held = self._requests.get(key)
        return held.request if held is not None else None

    def note(self, event: TokenEvent) -> Request | None:
        """Record an emitted event, and drop the request with its last event.

        Returns the request, or None where the operator does not hold it.
        """
        held = self._requests.get((event.request_id, event.choice))
        if held is None:
            return None
        held.token_ids += event.token_ids
        if not event.token_ids and (event.text or event.num_tokens_without_ids):
            held.texts.append((event.text, event.num_tokens_without_ids))
        if event.finish_reason is not None:
            self.drop(event.key)
        return held.request

    def drop(self, key: ChoiceKey) -> None:
        if self._requests.pop(key, None) is None:
            return
        choices = self._choices[key[0]]
        del choices[key[1]]
        if not choices:
            del self._choices[key[0]]

    def recall(self, key: ChoiceKey) -> Request | None:
        """Drop a request, and return it with everything that was emitted of it."""
        held = self._requests.get(key)
        if held is None:
            return None
        self.drop(key)
        request, texts = held.request, held.texts
        return msgspec.structs.replace(
            request,
            emitted_token_ids=(*request.emitted_token_ids, *held.token_ids),
            emitted_text=request.emitted_text + "".join(text for text, _ in texts),
            num_emitted_without_ids=request.num_emitted_without_ids + sum(n for _, n in texts),
        )

    def cancel(self, ctx: Context, signal: Signal) -> None:
        """Cancel the choices that a signal concerns in the engine.

        The cost does not grow with the other held requests.
        """
        for choice in tuple(self._choices.get(signal.request_id, ())):
            key = signal.request_id, choice
            if signal.concerns(key):
                ctx.engine.cancel(*key, self._requests[key].request.epoch)


def release_leases(ctx: Context, item: Item) -> None:
    """Free the leases of an item in whichever pools they are. Repeating it does no harm."""
    if not isinstance(item, Prefilled):
        return
    for lease in (item.lease, item.reservation):
        if lease is not None:
            engine: Engine = ctx.engine_named(lease.engine, lease.replica)
            engine.cancel(lease.request_id, lease.choice, lease.epoch)


def merge_stamps(request: Request, event: TokenEvent) -> TokenEvent:
    """The event with the stamps of earlier phases.

    An earlier stamp wins: a decode engine starts a sequence that a prefill engine started before.
    """
    before = msgspec.structs.asdict(request.stamps)
    after = msgspec.structs.asdict(event.stamps)
    known = {name: value for name, value in before.items() if value is not None}
    return msgspec.structs.replace(event, stamps=Stamps(**{**after, **known}))


def refusal_event(request: Request, error: EngineRefusal, now: float) -> TokenEvent:
    """The last event of a request that its engine refused."""
    return refusal(request, "refused", now=now, error=str(error), code=error.code)


def report_first_token(ctx: Context, request: Request, event: TokenEvent) -> None:
    """Report the latency of the first token upstream, once for each request.

    The latency runs from the queue to this operator's outlet.
    """
    dispatched_s = request.stamps.dispatched_s
    if dispatched_s is None or event.position != request.num_emitted or not event.num_tokens:
        return
    now, slo_ttft_s = ctx.now(), request.slo_ttft_s
    since_s = None if request.num_emitted else now - request.stamps.arrived_s
    first = FirstToken(seconds=now - dispatched_s, since_arrival_s=since_s, slo_ttft_s=slo_ttft_s)
    started_s, prefilled_s = event.stamps.started_s, event.stamps.prefilled_s
    if started_s is not None and prefilled_s is not None and prefilled_s > started_s:
        num_known = len(request.prompt_token_ids) + len(request.emitted_token_ids)
        first = FirstToken(
            seconds=first.seconds,
            num_computed_tokens=max(num_known - event.num_cached_tokens, 0),
            computed_s=prefilled_s - started_s,
            since_arrival_s=since_s,
            slo_ttft_s=slo_ttft_s,
        )
    ctx.report(first)


class Phases(NamedTuple):
    """Seconds of each phase; 0 for a phase that the request never reached or the graph lacks."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    decode_s: float = 0.0

    def plus(self, other: "Phases") -> "Phases":
        queue_s, prefill_s, transfer_s, decode_s = other
        return Phases(
            self.queue_s + queue_s,
            self.prefill_s + prefill_s,
            self.transfer_s + transfer_s,
            self.decode_s + decode_s,
        )


def phases_of(stamps: Stamps) -> Phases:
    """Split the time of a request into phases, by its stamps.

    A request is queued until an engine begins with it, so waiting inside an engine counts as
    queued. Each later phase begins where the previous one ended. A request that ended in the queue
    spent all its time there.
    """
    arrived, finished = stamps.arrived_s, stamps.finished_s
    started = _known(stamps.started_s, _known(finished, arrived))
    prefilled = _known(stamps.prefilled_s, _known(finished, started))
    transferred = _known(stamps.transferred_s, prefilled)
    decoded = _known(finished, transferred)
    return Phases(
        started - arrived, prefilled - started, transferred - prefilled, decoded - transferred
    )


def _known(time: float | None, otherwise: float) -> float:
    return otherwise if time is None else time
