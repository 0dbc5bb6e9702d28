"""A session: an open graph's `source` and `sink`, bound to callers by request id."""

import itertools
import secrets
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec
import trio

from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.executors.region import ends
from sagellm.runtime.executors.tasks import TasksExecutor
from sagellm.runtime.messages import Answer, Forked, Item, Request, Sampling, Stamps, TokenEvent
from sagellm.runtime.models.tokenizer import Tokenizer
from sagellm.runtime.operator import Signal
from sagellm.statistics import Statistics, statistics_of

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
Output: TypeAlias = TokenEvent | Answer

_FIELDS = (
    "request_id", "priority", "user_id", "model", "slo_ttft_s",
    "timeout_s", "cost_budget", "tags",
)  # fmt: skip


class RequestError(ValueError):
    """A request that was wrong before it entered the graph: the message says what and why."""


class Stream:
    """The tokens of one request as they come: an async iterator, entered or not.

    Leaving the `async with`, `aclose`, or losing the last reference cancels what is unfinished.
    """

    def __init__(
        self, session: "Session", requests: Sequence[Request], timeout_s: float | None = None
    ) -> None:
        self._session = session
        self._requests = requests
        self._timeout_s = timeout_s
        self._items: deque[Output] = deque()
        self._arrived = trio.lowlevel.ParkingLot()
        self._num_open = len(requests)
        self._is_started = False

    @property
    def request_id(self) -> str:
        return self._requests[0].request_id

    async def __aenter__(self) -> "Stream":
        await self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Output:
        """The next event or answer. Cancelled here, the request goes on until closed."""
        await self._start()
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._items:
            if self._num_open == 0:
                raise StopAsyncIteration
            await self._arrived.park()
        return self._items.popleft()

    async def aclose(self) -> None:
        """Cancel what is unfinished; the blocks are free within one engine step."""
        self._session.forget(self.request_id)

    def __del__(self) -> None:
        if self._is_started and self._num_open:
            self._session.forget(self.request_id)

    def put(self, item: Item | Forked) -> None:
        """Called by the session for each item of this request."""
        if isinstance(item, Forked):
            self._num_open += item.num_choices - 1
        elif isinstance(item, TokenEvent | Answer):
            self._items.append(item)
            self._num_open -= ends(item)
        if self._num_open == 0:
            self._session.forget(self.request_id)
        self._arrived.unpark_all()

    async def _start(self) -> None:
        if not self._is_started:
            self._is_started = True
            await self._session.submit(self._requests, _weakly(self), self._timeout_s)


def _weakly(stream: Stream) -> Callable[[Item | Forked], None]:
    """What the session calls; it does not keep alive a stream that its reader has dropped."""
    reference = weakref.ref(stream)

    def put(item: Item | Forked) -> None:
        alive = reference()
        if alive is not None:
            alive.put(item)

    return put


class Session:
    """An open graph, for callers inside trio. `stream`, `generate` and `cancel` are the door."""

    def __init__(self, tokenizer: Tokenizer, make_executor: Callable[..., TasksExecutor]) -> None:
        self._tokenizer = tokenizer
        self._callers: dict[str, Callable[[Item | Forked], None]] = {}
        self._numbers = itertools.count()
        self.executor = make_executor(self._deliver)
        self._opened_s = trio.current_time()

    def stream(self, prompt: Prompt, *, sampling: Sampling | None = None, **fields: Any) -> Stream:
        """Start one request when the stream is first read.

        `prompt` is a text, token ids, or chat messages. Further fields: request_id, priority,
        user_id, model, slo_ttft_s, timeout_s, cost_budget, tags. Raises
        RequestError for what is wrong with them.
        """
        timeout_s = fields.pop("timeout_s", None)
        return Stream(self, self._requests(prompt, sampling or Sampling(), fields), timeout_s)

    async def generate(
        self, prompt: Prompt, *, sampling: Sampling | None = None, **fields: Any
    ) -> Answer:
        """The whole answer (of choice 0); its `finish_reason` says whether it was served."""
        answers = await self.generate_all(prompt, sampling=sampling, **fields)
        return answers[0]

    async def generate_all(
        self, prompt: Prompt, *, sampling: Sampling | None = None, **fields: Any
    ) -> list[Answer]:
        """The answers of all choices, by choice."""
        parts: dict[int, list[Output]] = {}
        async with self.stream(prompt, sampling=sampling, **fields) as stream:
            async for item in stream:
                parts.setdefault(item.choice, []).append(item)
        return [gather(parts[choice]) for choice in sorted(parts)]

    def cancel(self, request_id: str) -> None:
        """End a request; an unknown one is ignored."""
        self.executor.signal(Signal("cancel", request_id))

    def statistics(self) -> Statistics:
        return statistics_of(self.executor, elapsed_s=trio.current_time() - self._opened_s)

    async def idle(self) -> None:
        """Wait until every request has ended."""
        await self.executor.idle()

    async def close(self) -> None:
        """End what is unfinished, and wait until everything has ended."""
        for request_id in tuple(self._callers):
            self.forget(request_id)
        await self.idle()

    # ---- what streams use ------------------------------------------------------------------

    async def submit(
        self,
        requests: Sequence[Request],
        caller: Callable[[Item | Forked], None],
        timeout_s: float | None,
    ) -> None:
        """Let all choices of one request in; it arrives, and its time begins, now."""
        request_id = requests[0].request_id
        if request_id in self._callers:
            raise RequestError(f"request {request_id!r} is running already; choose another id")
        self._callers[request_id] = caller
        now = trio.current_time()
        stamps, expires_s = Stamps(arrived_s=now), None if timeout_s is None else now + timeout_s
        for request in requests:
            await self.executor.submit(
                msgspec.structs.replace(request, stamps=stamps, expires_s=expires_s)
            )

    def forget(self, request_id: str) -> None:
        """The caller has gone: end what is unfinished and deliver nothing more."""
        if self._callers.pop(request_id, None) is not None:
            self.cancel(request_id)

    def _deliver(self, item: Item | Forked) -> None:
        caller = self._callers.get(item.request_id)
        if caller is not None:
            caller(item)

    def _requests(
        self, prompt: Prompt, sampling: Sampling, fields: Mapping[str, Any]
    ) -> list[Request]:
        """One request a choice, with ids, tokens and the seed resolved."""
        _refuse_unknown(fields)
        validate(sampling)
        text, token_ids = self._encode(prompt)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        first = Request(
            **{"request_id": f"req-{next(self._numbers)}", **fields},
            prompt=text,
            prompt_token_ids=token_ids,
            sampling=msgspec.structs.replace(sampling, seed=seed, n=1),
        )
        return [msgspec.structs.replace(first, choice=choice) for choice in range(sampling.n)]

    def _encode(self, prompt: Prompt) -> tuple[str, tuple[int, ...]]:
        """The prompt's text, which a `map` before the model may rewrite, and its tokens."""
        if isinstance(prompt, str):
            text, token_ids = prompt, self._tokenizer.encode(prompt)
        elif prompt and isinstance(prompt[0], Mapping):
            messages: Any = prompt
            text = self._tokenizer.apply_chat_template(messages)
            token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        else:
            ids: Any = prompt
            token_ids = tuple(ids)
            text = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token")
        return text, token_ids


def encode_prompt(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Tokens of a prompt that may begin with its own special tokens (a rendered conversation)."""
    plain, full = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
    return plain if plain[:1] == full[:1] else full


def _refuse_unknown(fields: Mapping[str, Any]) -> None:
    for name in fields:
        if name not in _FIELDS:
            close = nearest(name, _FIELDS)
            raise RequestError(f"a request has no field {name!r}; did you mean {close!r}?")


_RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 1 << 20), "min_tokens": (0, 1 << 20), "temperature": (0, 100),
    "top_k": (0, 1 << 30), "top_p": (1e-9, 1), "min_p": (0, 1), "repetition_penalty": (1e-3, 100),
    "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "n": (1, 128), "logprobs": (0, 20),
}  # fmt: skip


def validate(sampling: Sampling) -> None:
    """Raises RequestError for a value outside its range (NaN is outside every range)."""
    for name, (low, high) in _RANGES.items():
        value = getattr(sampling, name)
        if value is not None and not low <= value <= high:
            raise RequestError(f"{name} is {value}; it must be from {low} to {high}")
    if any(not text for text in sampling.stop):
        raise RequestError("a stop string is empty; leave it out")
    if sampling.min_tokens > sampling.max_tokens:
        raise RequestError("min_tokens is larger than max_tokens")


def gather(parts: Sequence[Output]) -> Answer:
    """The answer that one choice's events add up to."""
    last = parts[-1]
    if isinstance(last, Answer):
        return last
    events = [part for part in parts if isinstance(part, TokenEvent)]
    return Answer(
        request_id=last.request_id,
        choice=last.choice,
        text="".join(event.text for event in events),
        token_ids=tuple(token for event in events for token in event.token_ids),
        logprobs=tuple(logprob for event in events for logprob in event.logprobs),
        finish_reason=last.finish_reason or "failed",
        stop_reason=last.stop_reason,
        error=last.error,
        num_prompt_tokens=max(event.num_prompt_tokens for event in events),
        num_cached_tokens=max(event.num_cached_tokens for event in events),
        stamps=_stamps(events[0], last),
    )


def _stamps(first: TokenEvent, last: TokenEvent) -> Stamps:
    """How the request began, as its first event says (the last may come from outside its engine),
    and when it ended.
    """
    began = msgspec.structs.asdict(first.stamps)
    known = {name: at for name, at in began.items() if at is not None and name != "finished_s"}
    return msgspec.structs.replace(last.stamps, **known)
