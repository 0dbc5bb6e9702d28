"""User functions in a graph: how operators find and call them, and apply their results to items."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.messages import (
    OPERATOR_FAILED,
    Answer,
    FinishReason,
    Item,
    Prefilled,
    Request,
    TokenEvent,
)
from sagellm.runtime.operator import EncodeText, Setup
from sagellm.runtime.sampling import Sampling, sampling_fault
from sagellm.runtime.user_code import (
    LEAVING,
    CodeLeft,
    WrongResult,
    count_as_own,
    kind_of,
    module_of,
    name_of,
    place_of_code,
)


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A user's function that an operator calls; `symbol`: the name of the function in the graph."""

    operator: str
    symbol: str
    call: Callable[..., Any]

    @property
    def is_async(self) -> bool:
        is_async = inspect.iscoroutinefunction
        return is_async(self.call) or is_async(getattr(self.call, "__call__", None))  # noqa: B004

    def __call__(self, item: Item) -> Any:
        """Call the function. Raises WrongResult if it returns a coroutine, CodeLeft."""
        try:
            result = self.call(item)
        except LEAVING as error:
            raise CodeLeft(error) from error
        if inspect.iscoroutine(result):
            result.close()
            raise self.wrong("returned a coroutine; make it `async def`, which map awaits")
        return result

    async def wait(self, item: Item) -> Any:
        """Call an async function, and await its result. Raises CodeLeft."""
        try:
            return await self.call(item)
        except LEAVING as error:
            raise CodeLeft(error) from error

    def wrong(self, message: str) -> WrongResult:
        """The error of a function that returned an unusable value."""
        return WrongResult(message, place_of_code(self.call))

    def wanted(self, result: object, wanted: str) -> WrongResult:
        return self.wrong(f"returned {kind_of(result)}; {wanted} was wanted")

    def explain(self, error: Exception) -> str:
        """A message for clients: the operator, the function and the type of an error.

        The text of the error is left out because it may quote private data.
        """
        if isinstance(error, WrongResult):
            return f"{self.operator}: the function {self.symbol} {error}"
        return f"{self.operator}: the function {self.symbol} raised {name_of(error)}"


def find_function(setup: Setup, symbol: str) -> UserFunction:
    """The registered function with the name `symbol`. Raises ValueError for an unknown name."""
    if symbol not in setup.functions:
        close = nearest(symbol, list(setup.functions))
        hint = f"did you mean {close}?" if close else "register it before the graph opens"
        raise ValueError(f"{setup.name}: unknown function {symbol!r}: {hint}")
    found = setup.functions[symbol]
    count_as_own(module_of(found))
    return UserFunction(setup.name, symbol, found)


def find_plain_function(setup: Setup, symbol: str) -> UserFunction:
    """The registered function with the name `symbol`, for an operator that cannot await.

    Raises ValueError for an unknown name or an async function.
    """
    function = find_function(setup, symbol)
    if function.is_async:
        raise ValueError(
            f"{setup.name}: {symbol} is async, which only map can call: "
            "make it a plain function, or put a map with it before this operator"
        )
    return function


def failure_event(item: Item, why: str, *, now: float) -> TokenEvent:
    """The last event of the choice of `item`, on which an operator failed. Clients see `why`."""
    event = end_event(item, "failed", now=now, error=why)
    return msgspec.structs.replace(event, code=OPERATOR_FAILED)


def end_event(
    item: Item, reason: FinishReason, *, now: float, error: str | None = None
) -> TokenEvent:
    """The last event of the choice of `item`, if an operator and not an engine ends the choice."""
    if isinstance(item, Prefilled):
        item = item.first
    emitted = item.num_emitted if isinstance(item, Request) else item.num_tokens
    start = item.position if isinstance(item, TokenEvent) else 0
    known = len(item.prompt_token_ids) if isinstance(item, Request) else item.num_prompt_tokens
    # The cached tokens of a request are only the router's estimate.
    cached = 0 if isinstance(item, Request) else item.num_cached_tokens
    return TokenEvent(
        request_id=item.request_id,
        choice=item.choice,
        epoch=0 if isinstance(item, Answer) else item.epoch,
        position=start + emitted,
        finish_reason=reason,
        error=error,
        num_prompt_tokens=known,
        num_cached_tokens=cached,
        stamps=msgspec.structs.replace(item.stamps, finished_s=now),
    )


def apply_result(
    function: UserFunction,
    item: Item,
    result: object,
    encode: EncodeText | None,
) -> Item:
    """Apply the result of a user's function to its item, and return the new item.

    The function cannot change the id, choice and epoch of the item, or how a sequence ends. Raises
    WrongResult if the result does not fit the item.
    """
    if isinstance(item, Request):
        return _rewritten_request(function, item, result, encode)
    if isinstance(item, TokenEvent):
        return _rewritten_event(function, item, result)
    if isinstance(item, Answer):
        return _rewritten_answer(item, result)
    raise TypeError(f"a user's function does not take a {type(item).__name__}")


def _rewritten_request(
    function: UserFunction,
    item: Request,
    result: object,
    encode: EncodeText | None,
) -> Request:
    """The request with the changes of a user's function.

    If the function changed the prompt or the model but not the token ids, the prompt is encoded
    again.
    """
    if isinstance(result, str):
        result = msgspec.structs.replace(item, prompt=result)
    if not isinstance(result, Request):
        raise function.wanted(result, "a prompt or a Request")
    ids = result.prompt_token_ids
    is_changed = result.prompt != item.prompt or result.model != item.model
    if is_changed and ids == item.prompt_token_ids:
        ids = encode(result.prompt, result.model) if encode else ()
        had_ids = bool(item.prompt_token_ids) and result.model == item.model
        if encode and not ids and (had_ids or not result.prompt):
            raise function.wrong("returned an empty prompt; one with tokens was wanted")
    # Identity, progress, deadline and tenant are not the function's to change.
    return msgspec.structs.replace(
        result,
        request_id=item.request_id,
        choice=item.choice,
        epoch=item.epoch,
        prompt_token_ids=ids,
        messages=() if result.prompt != item.prompt else item.messages,
        num_cached_tokens=item.num_cached_tokens if ids == item.prompt_token_ids else 0,
        sampling=_sampling(function, item, result),
        stamps=item.stamps,
        placement=item.placement,
        expires_s=item.expires_s,
        emitted_token_ids=item.emitted_token_ids,
        emitted_text=item.emitted_text,
        num_emitted_without_ids=item.num_emitted_without_ids,
        salt=item.salt,
    )


def _sampling(function: UserFunction, item: Request, result: Request) -> Sampling:
    """The sampling parameters of a result; the old seed is kept if the function sets no seed.

    Raises WrongResult for invalid parameters.
    """
    wanted = result.sampling
    seed = item.sampling.seed if wanted.seed is None else wanted.seed
    sampling = msgspec.structs.replace(wanted, n=item.sampling.n, seed=seed)
    fault = sampling_fault(sampling)
    if fault is not None:
        raise function.wrong(f"returned a Request with wrong sampling: {fault}")
    return sampling


def _rewritten_event(function: UserFunction, item: TokenEvent, result: object) -> TokenEvent:
    if isinstance(result, str):
        return msgspec.structs.replace(item, text=result)
    if not isinstance(result, TokenEvent):
        raise function.wanted(result, "a text or a TokenEvent")
    return msgspec.structs.replace(
        result,
        request_id=item.request_id,
        choice=item.choice,
        epoch=item.epoch,
        position=item.position,
        finish_reason=item.finish_reason,
        stamps=item.stamps,
    )


def _rewritten_answer(item: Answer, result: object) -> Answer:
    if isinstance(result, str):
        return msgspec.structs.replace(item, text=result, value=result)
    if not isinstance(result, Answer):
        return msgspec.structs.replace(item, value=result)
    return msgspec.structs.replace(
        result, request_id=item.request_id, choice=item.choice, stamps=item.stamps
    )
