"""Tracing: selects requests, makes a trace of each when it ends, and sends the traces over OTLP.

While a request runs, only the time of its first token is recorded. Spans contain counts and
parameters, never users' content. Only sending needs the OpenTelemetry SDK.
"""

import importlib
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec
import trio

from sagellm.runtime.messages import Answer, Forked, Item, Request, TokenEvent
from sagellm.session import Session
from sagellm.tracing.spans import ERRORS, ChoiceTimes, OpenRequest, Trace, read_parent, trace_of

# Limit for traces of faulty requests outside the sample: under overload, all may be faulty.
_FORCED_PER_S = 10.0
_CLOSE_S = 5.0


class TracingError(RuntimeError):
    """The error for wrong options of tracing. The message has the fix."""


class Tracer:
    """A session observer that traces a sample of the requests, and all faulty requests.

    `sample`: the share of requests to trace; for a request with a traceparent, the sampled flag of
    the traceparent decides instead. A request is faulty if it ended in an error, took longer than
    `slow_s`, or missed its TTFT objective; at most _FORCED_PER_S faulty requests a second are
    traced. `model`: the model name in spans; `names`: in a graph of several models, `Request.model`
    -> name in spans. `send` is called in the session's loop, and must not block.
    """

    def __init__(
        self,
        send: Callable[[Trace], None],
        now: Callable[[], float],
        *,
        model: str,
        names: Mapping[str, str] = MappingProxyType({}),
        sample: float = 0.01,
        slow_s: float = 30.0,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._send = send
        self._now = now
        self._model = model
        self._names = dict(names)
        self._sample = sample
        self._slow_s = slow_s
        self._draw = draw
        self._open: dict[str, OpenRequest] = {}
        self._allowance = _FORCED_PER_S
        self._allowed_s = now()

    def submitted(self, requests: Sequence[Request]) -> None:
        choices = {request.choice: ChoiceTimes() for request in requests}
        first = requests[0]
        if first.model in self._names:
            first = msgspec.structs.replace(first, model=self._names[first.model])
        self._open[first.request_id] = OpenRequest(first, choices, len(requests))

    def delivered(self, item: Item | Forked) -> None:
        opened = self._open.get(item.request_id)
        if opened is None:
            return
        if isinstance(item, Forked):
            _fork(opened, item)
        elif isinstance(item, TokenEvent | Answer):
            self._note(opened, item)

    def _note(self, opened: OpenRequest, item: TokenEvent | Answer) -> None:
        choice = opened.choices[item.choice]
        choice.num_tokens += item.num_tokens
        if choice.first is None and item.num_tokens:  # later tokens need no reading of the clock
            choice.first, choice.first_s = item, self._now()
        if item.finish_reason is not None and choice.last is None:
            choice.last = item
            opened.num_open -= 1
            if not opened.num_open:
                del self._open[item.request_id]
                self._end(opened)

    def _end(self, opened: OpenRequest) -> None:
        parent, now = read_parent(opened.request.tags.get("traceparent", "")), self._now()
        is_drawn = parent.is_sampled if parent else self._draw() < self._sample
        if is_drawn or (self._is_wrong(opened, now) and self._may_force(now)):
            model = opened.request.model if self._names else self._model
            self._send(trace_of(opened, model, parent, now))

    def _is_wrong(self, opened: OpenRequest, now: float) -> bool:
        request, arrived_s = opened.request, opened.request.stamps.arrived_s
        choices = opened.choices.values()
        if any(choice.last and choice.last.finish_reason in ERRORS for choice in choices):
            return True
        firsts = [choice.first_s - arrived_s for choice in choices if choice.first]
        is_late = request.slo_ttft_s is not None and max(firsts, default=0.0) > request.slo_ttft_s
        return is_late or now - arrived_s > self._slow_s

    def _may_force(self, now: float) -> bool:
        # A token bucket with the capacity of one second.
        passed_s, self._allowed_s = now - self._allowed_s, now
        self._allowance = min(self._allowance + passed_s * _FORCED_PER_S, _FORCED_PER_S)
        if self._allowance < 1.0:
            return False
        self._allowance -= 1.0
        return True


def _fork(opened: OpenRequest, forked: Forked) -> None:
    for number in range(forked.num_choices):
        if number not in opened.choices:
            opened.choices[number] = ChoiceTimes()
            opened.num_open += 1


class Exporter(Protocol):
    """Queues traces, and sends them from another thread. Drops traces while the queue is full."""

    def send(self, trace: Trace) -> None: ...

    def close(self) -> None:
        """Send the queued traces. Blocks the thread for some seconds at most."""


@asynccontextmanager
async def open_tracing(
    session: Session,
    *,
    endpoint: str,
    model: str,
    names: Mapping[str, str] = MappingProxyType({}),
    sample: float = 0.01,
) -> AsyncIterator[None]:
    """Send traces of the session's requests to an OTLP/HTTP collector during the block.

    Leaving the block waits some seconds for queued traces to be sent, even if cancelled. Raises
    TracingError if the extra `otel` is not installed, and for an invalid endpoint or sample.
    """
    exporter = open_exporter(endpoint, sample)
    now = session.executor.now
    tracer = Tracer(exporter.send, now, model=model, names=names, sample=sample)
    session.observers.append(tracer)
    try:
        yield
    finally:
        session.observers.remove(tracer)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 2 * _CLOSE_S):
            # The deadline abandons a thread that waits for a collector which does not answer.
            await trio.to_thread.run_sync(exporter.close, abandon_on_cancel=True)


def open_exporter(endpoint: str, sample: float = 0.01) -> Exporter:
    """Create the exporter for a collector. Sends nothing yet. Raises TracingError."""
    exporter: Exporter = check_tracing(endpoint, sample).open_exporter(endpoint)
    return exporter


def check_tracing(endpoint: str, sample: float) -> Any:
    """Check the options, and return the module that sends traces. Raises TracingError.

    Commands call this before they read weights, so that a wrong option is reported at once.
    """
    if not 0.0 <= sample <= 1.0:
        raise TracingError(f"--trace-sample: {sample} is no share; give 0 to 1")
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise TracingError("--otlp-endpoint: give a URL such as http://localhost:4318")
    try:
        return importlib.import_module("sagellm.tracing.otel")
    except ImportError as error:
        raise TracingError("traces need the extra otel: pip install 'sagellm[otel]'") from error
