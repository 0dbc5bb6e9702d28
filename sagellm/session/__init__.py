"""A session: an open graph's `source` and `sink`, bound to callers by request id."""

import itertools
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import trio

from sagellm.graphs.log import get_logger
from sagellm.runtime.executors.tasks import ExecutorStopped, TasksExecutor
from sagellm.runtime.messages import Answer, Forked, Item, Request, Sampling, Stamps, TokenEvent
from sagellm.runtime.models.tokenizer import Tokenizer
from sagellm.runtime.operator import Signal
from sagellm.session.models import Model, Models
from sagellm.session.requests import (
    Encoded,
    Prompt,
    RequestError,
    RequestFailed,
    RequestRefused,
    encode,
    encode_bad_words,
    encode_prompt,
    raise_unserved,
    read_fields,
    read_sampling,
    read_text,
)
from sagellm.session.stream import (
    OUTPUTS,
    UNSERVED,
    ItemCallback,
    Output,
    Stream,
    Timing,
    UnreadLimits,
    gather,
)
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
    """Is told what passes a session's door, in the trio thread. It must not wait, nor raise."""

    def submitted(self, requests: Sequence[Request]) -> None:
        """All choices of one request, as they enter."""

    def delivered(self, item: Item | Forked) -> None:
        """Whatever comes out of the graph; exactly one last item for each choice submitted."""


class Session:
    """An open graph, for callers inside trio. `stream`, `generate` and `cancel` are the door."""

    def __init__(self, models: Models, make_executor: Callable[..., TasksExecutor]) -> None:
        self.observers: list[Observer] = []
        self.models = models
        self._callers: dict[str, ItemCallback] = {}
        self._codes: dict[str, str] = {}  # why the session itself has cancelled a request
        self._token = trio.lowlevel.current_trio_token()
        self._numbers = itertools.count()
        self.executor = make_executor(self._deliver)
        self.supervisor: Supervisor | None = None  # of the graph's workers, where it has some
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
        """Start one request when the stream is first read.

        `prompt` is a text, token ids, both (`Encoded`), or chat messages. Further fields:
        request_id, priority, user_id, model, salt, trace, slo_ttft_s, timeout_s, waited_s,
        cost_budget, tags. `model` chooses among several by name or alias; unsaid, the first.
        `waited_s`: how long ago the request arrived at the caller. `limit_tokens` and
        `limit_bytes`: what may wait unread (`Stream`). Raises RequestError for what is wrong with
        them; reading raises as `generate` does.
        """
        known = read_fields(fields)
        timing = Timing(known.pop("timeout_s", None), known.pop("waited_s", 0.0))
        requests = self._requests(prompt, sampling or Sampling(), known)
        return Stream(self, requests, timing, UnreadLimits(limit_tokens, limit_bytes))

    async def generate(
        self, prompt: Prompt, *, sampling: Sampling | None = None, **fields: Any
    ) -> Answer:
        """The whole answer (of choice 0); its `finish_reason` says how it ended.

        Raises RequestError for what is wrong with the request, RequestRefused where the graph
        refuses it, and RequestFailed where it fails in the graph.
        """
        answers = await self.generate_all(prompt, sampling=sampling, **fields)
        return answers[0]

    async def generate_all(
        self, prompt: Prompt, *, sampling: Sampling | None = None, **fields: Any
    ) -> list[Answer]:
        """The answers of all choices, by choice. Raises as `generate` does, for any choice."""
        parts: dict[int, list[Output]] = {}
        async with self.stream(prompt, sampling=sampling, **fields) as stream:
            while outputs := await stream.take_ended():
                for item in outputs:
                    parts.setdefault(item.choice, []).append(item)
                    if item.finish_reason in UNSERVED:
                        answer = gather(parts[item.choice])
                        raise_unserved(answer, stream.cause_of(item.choice))
        return [gather(parts[choice]) for choice in sorted(parts)]

    def encode(self, prompt: Prompt, *, model: str = "") -> Encoded:
        """The text and the tokens of a prompt, as a request has them; no tokens where the model's
        engine encodes it. Raises RequestError.
        """
        return self._encoded(self.models.named(model), prompt)[0]

    def cancel(self, request_id: str) -> bool:
        """End a request; False, and nothing happens, where it is not known."""
        is_known = request_id in self.executor.core.register.entries
        self.executor.signal(Signal("cancel", request_id))
        return is_known

    def is_in_use(self, request_id: str) -> bool:
        """Also one whose caller has gone, until its engine has let go of it."""
        return request_id in self._callers or request_id in self.executor.core.register

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model that serves requests which name none."""
        return self.models.default.tokenizer

    @property
    def max_model_len(self) -> int:
        """As `max_model_len_of`, of the model that serves requests which name none."""
        return self.max_model_len_of("")

    def max_model_len_of(self, model: str) -> int:
        """Tokens of the shortest context among a model's engines, or its own limit, if that is
        less: prompt and answer together. Raises RequestError for a model that there is not.
        """
        served = self.models.named(model).served
        engines = self.executor.engines
        every = (engine for name in served.engines for engine in engines[name])
        lengths = [engine.facts.max_model_len for engine in every]
        return min(lengths if served.max_model_len is None else [*lengths, served.max_model_len])

    def statistics(self) -> Statistics:
        return statistics_of(self.executor, elapsed_s=trio.current_time() - self._opened_s)

    def health(self) -> Health:
        return health_of(self.executor, self.supervisor)

    async def idle(self) -> None:
        """Wait until every request has ended and every block is free."""
        await self.executor.idle()

    async def close(self) -> None:
        """End what is unfinished, and wait until everything has ended."""
        for request_id in tuple(self._callers):
            self.end(request_id, "shutting_down")
        await self.idle()

    # ---- what streams use ------------------------------------------------------------------

    async def submit(
        self, requests: Sequence[Request], caller: ItemCallback, timing: Timing
    ) -> None:
        """Let all choices of one request in.

        Raises RequestError where its id is in use, or the session has ended.
        """
        request_id = requests[0].request_id
        if self.is_in_use(request_id):
            raise RequestError(f"request {request_id!r} is running already; choose another id")
        if self.executor.is_stopped:
            raise RequestError(str(ExecutorStopped()))
        arrived_s, timeout_s = trio.current_time() - timing.waited_s, timing.timeout_s
        stamps = Stamps(arrived_s=arrived_s)
        expires_s = None if timeout_s is None else arrived_s + timeout_s
        choices = [
            msgspec.structs.replace(request, stamps=stamps, expires_s=expires_s)
            for request in requests
        ]
        self._callers[request_id] = caller
        self._tell("submitted", choices)
        await self.executor.submit(*choices)

    def dismiss(self, request_id: str, caller: ItemCallback) -> None:
        """This caller has had all that comes: deliver nothing more to it."""
        if self._callers.get(request_id) is caller:
            del self._callers[request_id]
            self._codes.pop(request_id, None)

    def forget(self, request_id: str, caller: ItemCallback) -> None:
        """This caller has gone: end what is unfinished and deliver nothing more to it."""
        if self._callers.get(request_id) is caller:
            self.dismiss(request_id, caller)
            self.cancel(request_id)

    def forget_soon(self, request_id: str, caller: ItemCallback) -> None:
        """As `forget`, from wherever a stream was collected: any thread, any moment."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self.forget, request_id, caller)

    def end(self, request_id: str, code: str) -> None:
        """Cancel a request that has a caller, and tell it why: its last events have `code`."""
        self._codes[request_id] = code
        self.cancel(request_id)

    def cause_of(self, key: tuple[str, int]) -> Exception | None:
        """What was raised in the graph for a choice whose last event is being delivered."""
        return self.executor.cause

    def _deliver(self, item: Item | Forked) -> None:
        if self._codes:
            item = self._coded(item)
        if self.observers:
            self._tell("delivered", item)
        if isinstance(item, OUTPUTS) and item.finish_reason is not None and _is_logged():
            _log_end(item)
        caller = self._callers.get(item.request_id)
        if caller is not None:
            caller(item)

    def _coded(self, item: Item | Forked) -> Item | Forked:
        code = self._codes.get(item.request_id)
        if code and isinstance(item, TokenEvent | Answer) and item.finish_reason == "cancelled":
            return msgspec.structs.replace(item, code=code)
        return item

    def _tell(self, event: str, value: Any) -> None:
        """An observer's fault is logged: it must not take the graph down."""
        for observer in self.observers:
            try:
                getattr(observer, event)(value)
            except Exception as error:
                log.error("observer_failed", observer=type(observer).__name__, exc_info=error)

    def _requests(
        self, prompt: Prompt, sampling: Sampling, fields: Mapping[str, Any]
    ) -> list[Request]:
        """One request a choice, with ids, tokens, bad words and the seed resolved."""
        sampling = read_sampling(sampling)
        model = self.models.named(fields.get("model", ""))
        encoded, messages = self._encoded(model, prompt)
        if model.served.max_model_len is not None:
            sampling = self._limited(model.served.max_model_len, encoded, sampling)
        if self.models.is_several:
            fields = {
                **fields,
                "model": model.key,
                "salt": f"{model.scope}/{fields.get('salt', '')}",
            }
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        if not model.takes_text:
            sampling = _with_banned(sampling, model)
        first = Request(
            **{"request_id": self._free_id(), **fields},
            prompt=encoded.text,
            messages=messages,
            prompt_token_ids=encoded.token_ids,
            sampling=msgspec.structs.replace(sampling, seed=seed),
        )
        return [msgspec.structs.replace(first, choice=choice) for choice in range(sampling.n)]

    def _encoded(self, model: Model, prompt: Prompt) -> tuple[Encoded, tuple[dict[str, Any], ...]]:
        """The prompt, and the messages that the model's engine encodes."""
        if not model.takes_text:
            return encode(model.tokenizer, prompt), ()
        given = read_text(prompt)
        return Encoded(given.text, ()), given.messages

    def _limited(self, max_model_len: int, prompt: Encoded, sampling: Sampling) -> Sampling:
        """What a model's own limit leaves of the answer; engines know no more than theirs."""
        room = max_model_len - len(prompt.token_ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt.token_ids)} tokens; the context limit of the model "
                f"is {max_model_len}, and an answer needs one more"
            )
        return msgspec.structs.replace(sampling, max_tokens=min(sampling.max_tokens, room))

    def _free_id(self) -> str:
        numbered = (f"req-{number}" for number in self._numbers)
        return next(request_id for request_id in numbered if not self.is_in_use(request_id))


def _with_banned(sampling: Sampling, model: Model) -> Sampling:
    """With bad words as token ids."""
    banned = encode_bad_words(model.tokenizer, sampling.bad_words)
    return msgspec.structs.replace(
        sampling, bad_words=(), bad_words_token_ids=sampling.bad_words_token_ids + banned
    )


def _is_logged() -> bool:
    """Whether anybody wants to know of each end: asking costs much less than logging in vain."""
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
