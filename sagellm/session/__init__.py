"""A session: callers send requests to an open graph, and read the tokens of each request."""

import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import trio

from sagellm.graphs.log import get_logger
from sagellm.runtime.executors.tasks import ExecutorStopped, TasksExecutor
from sagellm.runtime.messages import Answer, Forked, Item, Request, Stamps, TokenEvent
from sagellm.runtime.models.tokenizer import Tokenizer
from sagellm.runtime.operator import Signal
from sagellm.runtime.sampling import Sampling
from sagellm.session.models import Models
from sagellm.session.requests import (
    Encoded,
    Prompt,
    RequestError,
    RequestFailed,
    RequestRefused,
    Timing,
    encode_prompt,
    raise_unserved,
    read_fields,
)
from sagellm.session.stream import (
    OUTPUTS,
    UNSERVED,
    Output,
    Stream,
    UnreadLimits,
    gather,
)
from sagellm.session.vectors import embed_texts
from sagellm.statistics import Health, Statistics, health_of, statistics_of

__all__ = [
    "Encoded",
    "Observer",
    "Output",
    "Prompt",
    "RequestError",
    "RequestFailed",
    "RequestRefused",
    "Session",
    "Stream",
    "encode_prompt",
    "gather",
]

if TYPE_CHECKING:
    from sagellm.runtime.cluster.supervisor import Supervisor

log = get_logger("sagellm.session")
_LEVELS = logging.getLogger("sagellm.session")


class Observer(Protocol):
    """Receives the requests and the items of a session, in the trio thread.

    The methods must neither block nor raise.
    """

    def submitted(self, requests: Sequence[Request]) -> None:
        """Called with all choices of one request, before these enter the graph."""

    def delivered(self, item: Item | Forked) -> None:
        """Called with each item that reaches the sink; each choice has exactly one last item."""


class Session:
    """Sends requests to an open graph, from tasks of the trio loop that runs the graph."""

    def __init__(self, models: Models, make_executor: Callable[..., TasksExecutor]) -> None:
        self.observers: list[Observer] = []
        self.models = models
        # Weak references: a reader may drop its stream, and the request must then be cancelled.
        self._streams: dict[str, weakref.ref[Stream]] = {}
        self._codes: dict[str, str] = {}  # request id -> code, for requests the session cancelled
        self._token = trio.lowlevel.current_trio_token()
        self._numbers = itertools.count()
        self.executor = make_executor(self._deliver)
        self.supervisor: Supervisor | None = None  # set if the graph has worker processes
        self._opened_s = trio.current_time()

    def stream(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling | None = None,
        limit_tokens: int | None = None,
        limit_bytes: int | None = None,
        **fields: Any,
    ) -> Stream:
        """Return the stream of one request. Entering or reading the stream submits the request.

        `prompt` is a text, token ids, both (`Encoded`), or chat messages. `fields` may be
        request_id, priority, can_be_preempted, user_id, model, salt, trace, slo_ttft_s, timeout_s,
        waited_s, cost_budget, no_queue, tags. `model` is a name or an alias; the default is the
        first model.
        `waited_s` is the time since the request arrived at the caller. `limit_tokens` and
        `limit_bytes` bound the unread items (see `Stream`). Raises RequestError for a wrong
        argument. Reading the stream raises as `generate` does.
        """
        known, timing = read_fields(fields)
        known = {"request_id": self.free_id(), **known}
        request = self.models.read(prompt, sampling or Sampling(), known)
        return self.start(request, timing, UnreadLimits(limit_tokens, limit_bytes))

    def start(
        self,
        request: Request,
        timing: Timing = Timing(),  # noqa: B008 (an immutable value)
        limits: UnreadLimits = UnreadLimits(),  # noqa: B008 (an immutable value)
    ) -> Stream:
        """Return the stream of a request that the caller has already checked.

        The prompt must be encoded, the sampling valid, and bad words must be token ids. The
        session resolves the model, the seed and the choices. Raises RequestError if the model is
        unknown, or if the model's context has no room for an answer.
        """
        return Stream(self, self.models.choices_of(request), timing, limits)

    async def generate(
        self, prompt: Prompt, *, sampling: Sampling | None = None, **fields: Any
    ) -> Answer:
        """Return the whole answer of choice 0. Its `finish_reason` is the reason of its end.

        Raises RequestError for a wrong request, RequestRefused if the graph refuses the request,
        and RequestFailed if the request fails in the graph.
        """
        answers = await self.generate_all(prompt, sampling=sampling, **fields)
        return answers[0]

    async def generate_all(
        self, prompt: Prompt, *, sampling: Sampling | None = None, **fields: Any
    ) -> list[Answer]:
        """Return the answers of all choices, in order. Raises as `generate` does."""
        parts: dict[int, list[Output]] = {}
        async with self.stream(prompt, sampling=sampling, **fields) as stream:
            while outputs := await stream.take_ended():
                for item in outputs:
                    parts.setdefault(item.choice, []).append(item)
                    if item.finish_reason in UNSERVED:
                        answer = gather(parts[item.choice])
                        raise_unserved(answer, stream.cause_of(item.choice))
        return [gather(parts[choice]) for choice in sorted(parts)]

    async def embed(
        self, texts: Sequence[Prompt], *, dimensions: int | None = None, **fields: Any
    ) -> list[list[float]]:
        """Return the vector of each text, in order. `fields` are those of `stream`.

        `dimensions`: the length of the vectors, for a model that was trained for shorter ones;
        None: the model's own. Raises RequestError for a wrong request and for a model that
        generates, and as `generate` for a text that the graph refuses or fails on.
        """
        return await embed_texts(self, texts, dimensions, fields)

    def encode(self, prompt: Prompt, *, model: str = "") -> Encoded:
        """Return the text and the tokens of a prompt, as a request would carry them.

        If the model's engine takes text, there are no tokens. Raises RequestError.
        """
        return self.models.named(model).read(prompt)

    def cancel(self, request_id: str) -> bool:
        """Cancel a request. Return False, without effect, for an unknown id."""
        is_known = request_id in self.executor.core.register.entries
        self.executor.signal(Signal("cancel", request_id))
        return is_known

    def is_in_use(self, request_id: str) -> bool:
        """Whether a request with this id is open; true until a dropped stream's request ends."""
        return request_id in self._streams or request_id in self.executor.core.register

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the default model."""
        return self.models.default.tokenizer

    @property
    def max_model_len(self) -> int:
        """The context length of the default model, in tokens. See `max_model_len_of`."""
        return self.max_model_len_of("")

    def max_model_len_of(self, model: str) -> int:
        """The context length of a model: the most tokens of prompt and answer together.

        This is the smallest limit among the model's engines and the model's own setting. Raises
        RequestError for an unknown model.
        """
        served = self.models.named(model).served
        engines = self.executor.engines
        every = (engine for name in served.engines for engine in engines[name])
        lengths = [engine.facts.max_model_len for engine in every]
        return min(lengths if served.max_model_len is None else [*lengths, served.max_model_len])

    def vector_len_of(self, model: str) -> int:
        """The numbers of a vector of a model that embeds; 0 for a model that generates.

        Raises RequestError for an unknown model.
        """
        engines = self.executor.engines
        every = (one for name in self.models.named(model).served.engines for one in engines[name])
        return min(engine.facts.vector_len for engine in every)

    def is_able(self, capability: str, model: str = "") -> bool:
        """Whether all engines of a model have a capability (`graphs/vocabulary.py`).

        Raises RequestError for an unknown model.
        """
        engines = self.executor.engines
        every = (one for name in self.models.named(model).served.engines for one in engines[name])
        return all(capability in engine.facts.capabilities for engine in every)

    def statistics(self) -> Statistics:
        return statistics_of(self.executor, elapsed_s=trio.current_time() - self._opened_s)

    def health(self) -> Health:
        return health_of(self.executor, self.supervisor)

    async def idle(self) -> None:
        """Wait until every request has ended and every KV block is free."""
        await self.executor.idle()

    async def close(self) -> None:
        """Cancel all open requests, and wait until every KV block is free."""
        for request_id in tuple(self._streams):
            self._end(request_id, "shutting_down")
        await self.idle()

    # ---- called by streams -----------------------------------------------------------------

    async def submit(self, stream: Stream) -> None:
        """Submit all choices of a stream's request to the graph.

        Raises RequestError if the request id is in use, or the executor has stopped.
        """
        request_id = stream.request_id
        if self.is_in_use(request_id):
            raise RequestError(f"request {request_id!r} is running already; choose another id")
        if self.executor.is_stopped:
            raise RequestError(str(ExecutorStopped()))
        arrived_s = trio.current_time() - stream.timing.waited_s
        timeout_s, stamps = stream.timing.timeout_s, Stamps(arrived_s=arrived_s)
        expires_s = None if timeout_s is None else arrived_s + timeout_s
        choices = [
            msgspec.structs.replace(request, stamps=stamps, expires_s=expires_s)
            for request in stream.requests
        ]
        # Before the graph gets the choices, whose first items may arrive during `submit`.
        self._streams[request_id] = weakref.ref(stream, partial(self._collected, request_id))
        self._notify("submitted", choices)
        await self.executor.submit(*choices)

    def forget(self, stream: Stream) -> None:
        """Cancel the unfinished request of a stream, and deliver no more items to the stream."""
        # A later stream may have reused the request id, and must not be cancelled.
        known = self._streams.get(stream.request_id)
        if known is not None and known() is stream:
            self._dismiss(stream.request_id)
            self.cancel(stream.request_id)

    def _collected(self, request_id: str, stream: weakref.ref[Stream]) -> None:
        """Forget a stream without references. The garbage collector calls this in any thread."""
        with suppress(trio.RunFinishedError):  # the graph is closed, and its requests have ended
            self._token.run_sync_soon(self._forget_collected, request_id, stream)

    def _forget_collected(self, request_id: str, stream: weakref.ref[Stream]) -> None:
        if self._streams.get(request_id) is stream:  # a new stream may have the same id
            self._dismiss(request_id)
            self.cancel(request_id)

    def _dismiss(self, request_id: str) -> None:
        """Stop delivering the items of a request."""
        self._streams.pop(request_id, None)
        self._codes.pop(request_id, None)

    def _end(self, request_id: str, code: str) -> None:
        """Cancel a request, and set `code` in the last event of each choice."""
        self._codes[request_id] = code
        self.cancel(request_id)

    def _deliver(self, item: Item | Forked) -> None:
        if self._codes:
            item = self._coded(item)
        if self.observers:
            self._notify("delivered", item)
        if isinstance(item, OUTPUTS) and item.finish_reason is not None and _is_logged():
            _log_end(item)
        known = self._streams.get(item.request_id)
        stream = None if known is None else known()
        if stream is None:  # the stream was closed or dropped, and its request is being cancelled
            return
        if stream.put(item, self.executor.cause):
            self._end(item.request_id, "slow_reader")
        elif stream.is_over:
            self._dismiss(item.request_id)

    def _coded(self, item: Item | Forked) -> Item | Forked:
        code = self._codes.get(item.request_id)
        if code and isinstance(item, TokenEvent | Answer) and item.finish_reason == "cancelled":
            return msgspec.structs.replace(item, code=code)
        return item

    def _notify(self, event: str, value: Any) -> None:
        """Call a method of every observer. Log its exception: it must not stop the graph."""
        for observer in self.observers:
            try:
                getattr(observer, event)(value)
            except Exception as error:
                log.error("observer_failed", observer=type(observer).__name__, exc_info=error)

    def free_id(self) -> str:
        """Return an id that no open request has."""
        numbered = (f"req-{number}" for number in self._numbers)
        return next(request_id for request_id in numbered if not self.is_in_use(request_id))


def _is_logged() -> bool:
    """Whether the level of `request_ended` is enabled.

    This test costs much less than a log call that is filtered out.
    """
    return _LEVELS.isEnabledFor(logging.DEBUG)


def _log_end(item: Output) -> None:
    log.debug(
        "request_ended",
        request_id=item.request_id,
        choice=item.choice,
        finish_reason=item.finish_reason,
        code=item.code,
        num_prompt_tokens=item.num_prompt_tokens,
    )
