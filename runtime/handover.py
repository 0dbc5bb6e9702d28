"""Helpers of operators with engines: required capabilities, held requests, leases and stamps."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from sagellm.graphs.vocabulary import GRAMMARS, LOGPROBS, RESUME, TOKENS_IN
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


# Capability -> (whether a request needs it, message and code of the refusal without it).
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
    GRAMMARS: (
        lambda request: request.sampling.grammar is not None,
        "the engine binds no answer to a grammar; ask for none",
        "bad_request",
    ),
    RESUME: (
        lambda request: request.num_emitted > 0,
        "the engine that answered was lost, and none of its kind can go on with an answer",
        ENGINE_FAILED,
    ),
}


def check_needs(request: Request, facts: EngineFacts) -> None:
    """Raise EngineRefusal if a request needs a capability that the engine lacks."""
    for capability in NEEDS.keys() - facts.capabilities:
        is_needed, why, code = NEEDS[capability]
        if is_needed(request):
            raise EngineRefusal(why, code)


@dataclass(slots=True)
class _HeldRequest:
    """A request in an engine, and the tokens that the engine has emitted.

    `texts`: (text, number of tokens) of each event, if the engine gives no token ids.
    """

    request: Request
    token_ids: list[int] = field(default_factory=list)
    texts: list[tuple[str, int]] = field(default_factory=list)


class HeldRequests:
    """The requests that one operator has in its engine, each with its emitted tokens."""

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
        """Record the tokens of an event; drop the request if the event is its last.

        Returns the request, or None if the operator does not hold it.
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
        """Drop a request, and return it with all its emitted tokens; None if it is not held."""
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
        """Cancel in the engine the held choices that a signal concerns.

        The time does not depend on the number of other held requests.
        """
        for choice in tuple(self._choices.get(signal.request_id, ())):
            key = signal.request_id, choice
            if signal.concerns(key):
                ctx.engine.cancel(*key, self._requests[key].request.epoch)


def release_leases(ctx: Context, item: Item) -> None:
    """Free the leases of an item in their pools. A repeated call does nothing."""
    if not isinstance(item, Prefilled):
        return
    for lease in (item.lease, item.reservation):
        if lease is not None:
            engine: Engine = ctx.engine_named(lease.engine, lease.replica)
            engine.cancel(lease.request_id, lease.choice, lease.epoch)


def merge_stamps(request: Request, event: TokenEvent) -> TokenEvent:
    """The event with the stamps that the request got in earlier phases.

    If both have a stamp, that of the request counts: the decode engine starts the sequence again
    that the prefill engine has started.
    """
    before = msgspec.structs.asdict(request.stamps)
    after = msgspec.structs.asdict(event.stamps)
    # `arrived_s` is never None, so that of the request always counts.
    known = {name: value for name, value in before.items() if value is not None}
    return msgspec.structs.replace(event, stamps=Stamps(**{**after, **known}))


def refusal_event(request: Request, error: EngineRefusal, now: float) -> TokenEvent:
    """The last event of a request that its engine refused."""
    return refusal(request, "refused", now=now, error=str(error), code=error.code)


def report_first_token(ctx: Context, request: Request, event: TokenEvent) -> None:
    """Send the feedback `FirstToken` upstream if `event` has the first token of `request`.

    Does nothing for later events. The latency counts from leaving the queue until now, or from the
    arrival if the request passed no queue. Does nothing for a request that passed no queue and
    entered again, because its arrival says nothing of the engine.
    """
    dispatched_s = request.stamps.dispatched_s
    if dispatched_s is None and not request.epoch:
        dispatched_s = request.stamps.arrived_s
    if dispatched_s is None or event.position != request.num_emitted or not event.num_tokens:
        return
    now, slo_ttft_s = ctx.now(), request.slo_ttft_s
    # A resumed request had its first token before: its TTFT must not count again.
    since_s = None if request.num_emitted else now - request.stamps.arrived_s
    first = FirstToken(
        seconds=now - dispatched_s,
        since_arrival_s=since_s,
        slo_ttft_s=slo_ttft_s,
        request_id=request.request_id,
    )
    started_s, prefilled_s = event.stamps.started_s, event.stamps.prefilled_s
    if started_s is not None and prefilled_s is not None and prefilled_s > started_s:
        num_known = len(request.prompt_token_ids) + len(request.emitted_token_ids)
        first = msgspec.structs.replace(
            first,
            num_computed_tokens=max(num_known - event.num_cached_tokens, 0),
            computed_s=prefilled_s - started_s,
        )
    ctx.report(first)


class Phases(NamedTuple):
    """The seconds that a request spent in each phase; 0 for a phase that it did not enter."""

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

    The queue phase lasts until an engine starts to compute the prompt, so it includes waiting
    inside the engine. Each later phase begins when the previous phase ended. If the request ended
    early, the last phase that it entered lasts until the end.
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
