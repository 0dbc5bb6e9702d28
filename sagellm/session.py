"""A session: an open graph's `source` and `sink`, bound to callers by request id."""

import itertools
import secrets
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, TypeAlias

import msgspec
import trio

from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.executors.region import ends
from sagellm.runtime.executors.tasks import ExecutorStopped, TasksExecutor
from sagellm.runtime.messages import (
    NORMAL,
    PRIORITIES,
    Answer,
    Forked,
    Item,
    Request,
    Sampling,
    Stamps,
    TokenEvent,
)
from sagellm.runtime.models.chat import ChatTemplateError
from sagellm.runtime.models.tokenizer import Tokenizer
from sagellm.runtime.operator import Signal
from sagellm.runtime.sampling import fault_of
from sagellm.statistics import Statistics, statistics_of

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
Output: TypeAlias = TokenEvent | Answer
Caller: TypeAlias = Callable[[Item | Forked], None]


class RequestError(ValueError):
    """A request that was wrong before it entered the graph: the message says what and why."""


class Stream:
    """The tokens of one request as they come: an async iterator, entered or not.

    Leaving the `async with`, `aclose`, or losing the last reference cancels what is unfinished;
    the stream is then at its end. Cancelled before it was let in, a request ends as cancelled.
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
        self._caller = _weakly(self)

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
        self._is_started = True
        self._session.forget(self.request_id, self._caller)
        self._items.clear()
        self._num_open = 0
        self._arrived.unpark_all()

    def __del__(self) -> None:
        if self._is_started and self._num_open:
            self._session.forget_soon(self.request_id, self._caller)

    def put(self, item: Item | Forked) -> None:
        """Called by the session for each item of this request."""
        if isinstance(item, Forked):
            self._num_open += item.num_choices - 1
        elif isinstance(item, TokenEvent | Answer):
            self._items.append(item)
            self._num_open -= ends(item)
        if self._num_open == 0:
            self._session.forget(self.request_id, self._caller)
        self._arrived.unpark_all()

    async def _start(self) -> None:
        if not self._is_started:
            self._is_started = True
            try:
                await self._session.submit(self._requests, self._caller, self._timeout_s)
            except RequestError:
                self._num_open = 0
                raise


def _weakly(stream: Stream) -> Caller:
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
        self._callers: dict[str, Caller] = {}
        self._token = trio.lowlevel.current_trio_token()
        self._numbers = itertools.count()
        self.executor = make_executor(self._deliver)
        self._opened_s = trio.current_time()

    def stream(self, prompt: Prompt, *, sampling: Sampling | None = None, **fields: Any) -> Stream:
        """Start one request when the stream is first read.

        `prompt` is a text, token ids, or chat messages. Further fields: request_id, priority,
        user_id, model, slo_ttft_s, timeout_s, cost_budget, tags. Raises
        RequestError for what is wrong with them.
        """
        known = _read_fields(fields)
        timeout_s = known.pop("timeout_s", None)
        return Stream(self, self._requests(prompt, sampling or Sampling(), known), timeout_s)

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
            self.cancel(request_id)
        await self.idle()

    # ---- what streams use ------------------------------------------------------------------

    async def submit(
        self, requests: Sequence[Request], caller: Caller, timeout_s: float | None
    ) -> None:
        """Let all choices of one request in; it arrives, and its time begins, now.

        Raises RequestError where its id is in use, or the session has ended.
        """
        request_id = requests[0].request_id
        if request_id in self._callers or request_id in self.executor.register:
            raise RequestError(f"request {request_id!r} is running already; choose another id")
        now = trio.current_time()
        stamps, expires_s = Stamps(arrived_s=now), None if timeout_s is None else now + timeout_s
        choices = [
            msgspec.structs.replace(request, stamps=stamps, expires_s=expires_s)
            for request in requests
        ]
        self._callers[request_id] = caller
        try:
            await self.executor.submit(*choices)
        except ExecutorStopped as error:
            del self._callers[request_id]
            raise RequestError(str(error)) from error

    def forget(self, request_id: str, caller: Caller) -> None:
        """This caller has gone: end what is unfinished and deliver nothing more to it."""
        if self._callers.get(request_id) is caller:
            del self._callers[request_id]
            self.cancel(request_id)

    def forget_soon(self, request_id: str, caller: Caller) -> None:
        """As `forget`, from wherever a stream was collected: any thread, any moment."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self.forget, request_id, caller)

    def _deliver(self, item: Item | Forked) -> None:
        caller = self._callers.get(item.request_id)
        if caller is not None:
            caller(item)

    def _requests(
        self, prompt: Prompt, sampling: Sampling, fields: Mapping[str, Any]
    ) -> list[Request]:
        """One request a choice, with ids, tokens and the seed resolved."""
        sampling = _read_sampling(sampling)
        fault = fault_of(sampling)
        if fault is not None:
            raise RequestError(fault)
        text, token_ids = self._encode(prompt)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        first = Request(
            **{"request_id": self._free_id(), **fields},
            prompt=text,
            prompt_token_ids=token_ids,
            sampling=msgspec.structs.replace(sampling, seed=seed, n=1),
        )
        return [msgspec.structs.replace(first, choice=choice) for choice in range(sampling.n)]

    def _free_id(self) -> str:
        while (request_id := f"req-{next(self._numbers)}") in self._callers:
            pass
        return request_id

    def _encode(self, prompt: Prompt) -> tuple[str, tuple[int, ...]]:
        """The prompt's text, which a `map` before the model may rewrite, and its tokens."""
        if isinstance(prompt, str):
            text, token_ids = prompt, self._tokenizer.encode(_encodable(prompt))
        elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
            raise RequestError(f"a prompt is text, token ids or messages, not {_kind(prompt)}")
        elif prompt and isinstance(prompt[0], Mapping):
            messages: Any = prompt
            try:
                text = _encodable(self._tokenizer.apply_chat_template(messages))
            except ChatTemplateError as error:
                raise RequestError(str(error)) from error
            token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        else:
            token_ids = _read_ids(prompt)
            text = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token")
        return text, token_ids


def encode_prompt(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Tokens of a prompt that may begin with its own special tokens (a rendered conversation)."""
    plain, full = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
    return plain if plain[:1] == full[:1] else full


class _Fields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a caller may say of a request, beside its prompt and sampling."""

    request_id: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] = ""
    priority: Annotated[int, msgspec.Meta(ge=0, le=4)] = NORMAL
    user_id: str = ""
    model: str = ""
    slo_ttft_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    cost_budget: Annotated[float, msgspec.Meta(ge=0)] | None = None
    tags: dict[str, str] = {}


def _read_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with their types checked. Raises RequestError."""
    for name in fields:
        if name not in _Fields.__struct_fields__:
            close = nearest(name, _Fields.__struct_fields__)
            raise RequestError(f"a request has no field {name!r}; did you mean {close!r}?")
    if fields.get("priority") in PRIORITIES:
        fields = {**fields, "priority": PRIORITIES[fields["priority"]]}
    try:
        read = msgspec.convert(fields, _Fields)
    except msgspec.ValidationError as error:
        raise RequestError(f"a field of the request is wrong: {error}") from error
    return {name: getattr(read, name) for name in fields}


def _read_sampling(sampling: Sampling) -> Sampling:
    """The parameters with their types checked: msgspec structs do not check what they are given."""
    if not isinstance(sampling, Sampling):
        raise RequestError(f"sampling is a Sampling, not {_kind(sampling)}")
    try:
        return msgspec.convert(msgspec.structs.asdict(sampling), Sampling)
    except msgspec.ValidationError as error:
        raise RequestError(f"sampling is wrong: {error}") from error


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not Unicode text: {error.reason}") from error
    return text


def _kind(value: object) -> str:
    return type(value).__name__


def _read_ids(prompt: Sequence[Any]) -> tuple[int, ...]:
    """Token ids as plain integers. Whether the model knows them, its engine says."""
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 1 << 31:
            raise RequestError(f"the prompt has {token!r} where a token id should be")
    return tuple(prompt)


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
