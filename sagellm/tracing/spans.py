"""Makes the spans of a request from its time stamps, after the request has ended.

Spans contain counts and parameters, never users' content.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from sagellm.runtime.messages import Answer, Request, Stamps, TokenEvent

Attributes: TypeAlias = dict[str, str | int | float | bool | tuple[str, ...]]

ERRORS = frozenset({"failed", "expired", "refused"})  # finish reasons that mark a span as an error
_OPERATIONS = frozenset({"chat", "text_completion"})
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_PHASES = ("policy", "route", "prefill", "kv_transfer", "decode")


class Parent(NamedTuple):
    """The span of the client, read from a W3C traceparent."""

    trace_id: int
    span_id: int
    is_sampled: bool


def read_parent(traceparent: str) -> Parent | None:
    """Parse a traceparent (W3C Trace Context, level 1); None for an invalid one."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None or match[1] == "ff":
        return None
    trace_id, span_id = int(match[2], 16), int(match[3], 16)
    if not trace_id or not span_id:
        return None
    return Parent(trace_id, span_id, bool(int(match[4], 16) & 1))


@dataclass(frozen=True, slots=True)
class Span:
    """One span. Times are seconds on the executor's clock."""

    name: str
    begun_s: float
    ended_s: float
    attributes: Attributes = field(default_factory=dict)
    events: tuple[tuple[str, float], ...] = ()
    error: str = ""  # a finish reason; empty for success


@dataclass(frozen=True, slots=True)
class Trace:
    """A root span of kind SERVER, and its child spans. `now_s`: when the trace was made."""

    root: Span
    children: tuple[Span, ...]
    parent: Parent | None
    now_s: float


@dataclass(slots=True)
class ChoiceTimes:
    """The events of a choice that spans are made from.

    `first`: the first event with tokens; `first_s`: its delivery time; `last`: the last event.
    """

    first: TokenEvent | Answer | None = None
    first_s: float = 0.0
    last: TokenEvent | Answer | None = None
    num_tokens: int = 0


@dataclass(slots=True)
class OpenRequest:
    """A running request. `num_open`: the number of its choices that have not ended."""

    request: Request
    choices: dict[int, ChoiceTimes]
    num_open: int


def trace_of(opened: OpenRequest, model: str, parent: Parent | None, now: float) -> Trace:
    """Make the trace of a request that has ended at `now`."""
    request = opened.request
    operation = request.tags.get("operation", "")
    operation = operation if operation in _OPERATIONS else "text_completion"
    reasons = [choice.last.finish_reason or "" for choice in opened.choices.values() if choice.last]
    root = Span(
        f"{operation} {request.model or model}",
        request.stamps.arrived_s,
        now,
        {
            "gen_ai.operation.name": operation,
            "gen_ai.response.model": model,
            "gen_ai.response.finish_reasons": tuple(reasons),
            **_asked(request, request.model or model, len(opened.choices)),
            **_used(opened),
            **_latencies(opened, now),
        },
        error=next((reason for reason in reasons if reason in ERRORS), ""),
    )
    children = [
        span for number, choice in opened.choices.items()
        for span in _children(request, number, choice, now)
    ]  # fmt: skip
    return Trace(root, tuple(children), parent, now)


def _asked(request: Request, model: str, num_choices: int) -> Attributes:
    sampling = request.sampling
    attributes: Attributes = {
        "gen_ai.provider.name": "sagellm",
        "gen_ai.request.model": model,
        "gen_ai.request.id": request.request_id,
        "gen_ai.response.id": request.request_id,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.choice.count": num_choices,
        "gen_ai.request.n": num_choices,  # the name in vLLM
    }
    return (
        attributes
        if sampling.seed is None
        else {**attributes, "gen_ai.request.seed": sampling.seed}
    )


def _used(opened: OpenRequest) -> Attributes:
    lasts = [choice.last for choice in opened.choices.values() if choice.last]
    firsts = [choice.first for choice in opened.choices.values() if choice.first]
    num_prompt = max((last.num_prompt_tokens for last in lasts), default=0)
    num_output = sum(each.num_tokens for each in opened.choices.values())
    return {
        "gen_ai.usage.input_tokens": num_prompt,
        "gen_ai.usage.output_tokens": num_output,
        "gen_ai.usage.prompt_tokens": num_prompt,  # this name and the next one are from vLLM
        "gen_ai.usage.completion_tokens": num_output,
        "gen_ai.usage.cache_read.input_tokens": max(
            (event.num_cached_tokens for event in (*firsts, *lasts)), default=0
        ),
    }


def _latencies(opened: OpenRequest, now: float) -> Attributes:
    """The latency attributes of vLLM, for the choice with the earliest first token.

    A phase that this choice did not reach has no attribute.
    """
    arrived_s = opened.request.stamps.arrived_s
    known: Attributes = {"gen_ai.latency.e2e": now - arrived_s}
    with_tokens = [choice for choice in opened.choices.values() if choice.first]
    if not with_tokens:
        return known
    choice = min(with_tokens, key=lambda each: each.first_s)
    known["gen_ai.latency.time_to_first_token"] = choice.first_s - arrived_s
    known["gen_ai.response.time_to_first_chunk"] = choice.first_s - arrived_s
    stamps = _stamps(choice)
    if stamps.started_s is not None:
        known["gen_ai.latency.time_in_queue"] = stamps.started_s - arrived_s
    if stamps.started_s is not None and stamps.prefilled_s is not None:
        finished_s = now if stamps.finished_s is None else stamps.finished_s
        moved_s = stamps.transferred_s
        decoding_s = stamps.prefilled_s if moved_s is None else moved_s
        known["gen_ai.latency.time_in_model_prefill"] = stamps.prefilled_s - stamps.started_s
        known["gen_ai.latency.time_in_model_decode"] = finished_s - decoding_s
        known["gen_ai.latency.time_in_model_inference"] = finished_s - stamps.started_s
    return known


def _stamps(choice: ChoiceTimes) -> Stamps:
    """The stamps of a choice, combined from its last and its first event.

    Either event may come from outside the engine, and then lacks the engine's stamps.
    """
    last = choice.last.stamps if choice.last else Stamps()
    first = choice.first.stamps if choice.first else Stamps()
    return Stamps(
        dispatched_s=_first(last.dispatched_s, first.dispatched_s),
        started_s=_first(last.started_s, first.started_s),
        prefilled_s=_first(last.prefilled_s, first.prefilled_s),
        transferred_s=_first(last.transferred_s, first.transferred_s),
        finished_s=last.finished_s,
    )


def _first(*times: float | None) -> float | None:
    return next((at for at in times if at is not None), None)


def _children(request: Request, number: int, choice: ChoiceTimes, now: float) -> list[Span]:
    """The child spans of a choice: one for each phase that its stamps show.

    `route` is the time between leaving the queue of `policy_sort` and the first engine step.
    """
    stamps, arrived_s = _stamps(choice), request.stamps.arrived_s
    finished_s = now if stamps.finished_s is None else stamps.finished_s
    is_refused = choice.last is not None and choice.last.finish_reason == "refused"
    if is_refused and stamps.dispatched_s is None:
        return [_child("admission", number, arrived_s, finished_s)]
    ends = (stamps.dispatched_s, stamps.started_s, stamps.prefilled_s, stamps.transferred_s)
    reached = [(name, at) for name, at in zip(_PHASES, ends, strict=False) if at is not None]
    spans, begun_s = [], arrived_s
    for name, at in reached:
        spans.append(_child(name, number, begun_s, at))
        begun_s = at
    unfinished = _after(reached[-1][0] if reached else "")
    spans.append(_child(unfinished, number, begun_s, finished_s))
    spans.append(_child("sink", number, finished_s, now))
    return spans


def _after(phase: str) -> str:
    """The phase after `phase`, the last completed phase; the request ended in it."""
    return {"": "policy", "policy": "route", "route": "prefill"}.get(phase, "decode")


def _child(name: str, number: int, begun_s: float, ended_s: float) -> Span:
    events = (("first_token", begun_s),) if name == "decode" else ()
    # Stamps of two processes may be out of order, because their clocks differ slightly.
    return Span(name, begun_s, max(begun_s, ended_s), {"sagellm.choice": number}, events)
