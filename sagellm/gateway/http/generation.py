"""Calls that generate tokens: from the request body to a streamed or a whole answer."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import time
from typing import TypeAlias

import anyio
import anyio.lowlevel
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sagellm.chat_formats import OpenParser, open_plain_parser
from sagellm.gateway.answers.event_stream import EventWriter, attended, event_stream
from sagellm.gateway.answers.logprobs import TokenNames
from sagellm.gateway.answers.writer import (
    AnswerSpec,
    AnswerWriter,
    MakeAnswerForm,
    UsageCounter,
    error_of,
)
from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.budgets import BudgetHold, Budgets
from sagellm.gateway.gateway import Gateway, HostedModel
from sagellm.gateway.graph_bridge import EventBatch, open_streams
from sagellm.gateway.http.call import CLIENT_LEFT, Call
from sagellm.gateway.http.checks import RequestBody
from sagellm.gateway.protocol.bodies import ChatRequest, CompletionRequest
from sagellm.gateway.protocol.sampling_params import far_too_long, fitted, num_logprobs, sampling_of
from sagellm.runtime.messages import NORMAL, PRIORITIES
from sagellm.runtime.messages import Request as GraphRequest
from sagellm.runtime.sampling import Grammar, Sampling
from sagellm.session.requests import Encoded, Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationCall:
    """A checked and encoded call. `samplings` has one entry for each prompt.

    `prefix`: the start of the answer's id. `is_prompt_only`: the answer is an echo of the prompt.
    `open_parser`: opens the parser of one choice of a chat. `has_reasoning`: there may be
    reasoning among its parts.
    """

    request: CompletionRequest | ChatRequest
    served: HostedModel
    prompts: tuple[Encoded, ...]
    samplings: tuple[Sampling, ...]
    make_form: MakeAnswerForm
    prefix: str
    is_echo: bool = False
    is_prompt_only: bool = False
    open_parser: OpenParser = open_plain_parser
    has_reasoning: bool = False


# Reads the body of a call. Raises ApiError.
ReadCall: TypeAlias = Callable[[Gateway, bytes], Awaitable[GenerationCall]]


async def encoded(
    served: HostedModel, asked: CompletionRequest | ChatRequest, text: str
) -> tuple[int, ...]:
    """Return the tokens of a prompt's text. Raises ApiError.

    A text that is much longer than the context is refused before all of it is tokenised.
    """
    facts = served.facts
    is_kept = asked.truncate_prompt_tokens is None
    param = "messages" if isinstance(asked, ChatRequest) else "prompt"
    if is_kept and await served.encoder.exceeds(text, facts.max_model_len, param=param):
        raise far_too_long(asked, facts)
    add = asked.add_special_tokens
    return await served.encoder.text(text, add_special_tokens=add, param=param)


async def samplings_of(
    served: HostedModel,
    asked: CompletionRequest | ChatRequest,
    prompts: Sequence[Encoded],
    grammar: Grammar | None = None,
) -> tuple[Sampling, ...]:
    """Return the sampling of each prompt, with bad words as token ids. Raises ApiError."""
    # All samplings share ids and texts, checked once: a request may have 262,144 token ids.
    facts = served.facts
    sampling = sampling_of(asked, facts, len(prompts[0].token_ids))
    if grammar is not None:
        sampling = msgspec.structs.replace(sampling, grammar=grammar)
    if asked.bad_words and not facts.takes_text:
        banned = await served.encoder.banned(asked.bad_words)
        sampling = msgspec.structs.replace(sampling, bad_words=(), bad_words_token_ids=banned)
    samplings = [sampling]
    for prompt in prompts[1:]:
        await anyio.lowlevel.checkpoint()
        samplings.append(fitted(sampling, asked, facts, len(prompt.token_ids)))
    return tuple(samplings)


class GenerationResponse:
    """The response to one call, an ASGI app.

    It reads the body, submits the requests to the graph, and sends the events as a stream or as
    one whole answer.
    """

    def __init__(self, gateway: Gateway, request: Request, read: ReadCall) -> None:
        self._gateway = gateway
        self._request = request
        self._read = read
        self._call: Call = request.state.call
        self._usage = request.state.usage = UsageCounter()  # for the log line of the call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the call. Raises ApiError if it is refused before the response has started."""
        gateway = self._gateway
        # The hold begins before the body is read: reading and encoding cost memory and threads.
        with self._budgets.hold(self._call.tenant) as hold:
            work = await self._read(gateway, await self._request.body())
            if work.request.stream:
                limits, on_gone = gateway.settings.streaming, gateway.meters.disconnected
                async with event_stream(scope, receive, send, limits, on_gone) as events:
                    await self._stream(work, hold, events)
                return
            async with attended(receive) as client:
                content = await self._whole(work, hold)
        if client.has_left:
            gateway.meters.disconnected()
            response = Response(status_code=CLIENT_LEFT)
        else:
            response = Response(content, media_type="application/json")
        await response(scope, receive, send)

    async def _stream(self, work: GenerationCall, hold: BudgetHold, events: EventWriter) -> None:
        """Stream the answer.

        Raises ApiError if the graph refuses the call before the first event: the response then has
        the status of the error.
        """
        with self._started(work, hold) as (requests, answer):
            events.failure_of = answer.failure
            async with open_streams(self._gateway.bridge, requests, self._timing(work)) as batches:
                last = b""  # held back, to send the last chunk and the ending together
                async for batch in batches:
                    served, error = self._split(batch, hold)
                    if error is not None and not events.is_started:
                        raise error
                    content = last + (answer.chunks(served) if served else b"")
                    last = content if answer.is_finished and error is None else b""
                    if content and not last:
                        await events.send(content)
                    if error is not None:
                        raise error
            answer.check_finished()
            await events.send(last + answer.ending(), is_last=True)

    async def _whole(self, work: GenerationCall, hold: BudgetHold) -> bytes:
        """Return the JSON text of the whole answer. Raises ApiError if a choice is not served."""
        with self._started(work, hold) as (requests, answer):
            async with open_streams(self._gateway.bridge, requests, self._timing(work)) as batches:
                async for batch in batches:
                    served, error = self._split(batch, hold)
                    if error is not None:
                        raise error
                    answer.add(served)
            answer.check_finished()
            return answer.whole()

    @contextmanager
    def _started(
        self, work: GenerationCall, hold: BudgetHold
    ) -> Iterator[tuple[list[GraphRequest], AnswerWriter]]:
        """Yield the graph requests of a call, with unique ids, and the writer of the answer.

        The ids and the places in the budget are held during the `with` block.
        """
        wanted = work.request.request_id or self._call.request_id
        with (
            hold.widened(len(work.prompts) * work.request.n),
            self._gateway.claim(wanted, len(work.prompts)) as claimed,
        ):
            spec = _answer_spec(work, claimed.id)
            names = work.request.return_tokens_as_token_ids
            texts = TokenNames(work.served.tokens) if names else work.served.tokens
            answer = AnswerWriter(spec, work.make_form(spec, texts), self._usage)
            yield self._requests(work, claimed.request_ids), answer

    def _requests(self, work: GenerationCall, ids: Sequence[str]) -> list[GraphRequest]:
        asked, call, card = work.request, self._call, work.served.card
        tags = {"operation": "chat" if isinstance(asked, ChatRequest) else "text_completion"}
        if call.traceparent:
            tags["traceparent"] = call.traceparent
        salt = self._gateway.salt_of(call.tenant, asked.cache_salt)
        return [
            GraphRequest(
                request_id=request_id,
                prompt=prompt.text,
                prompt_token_ids=prompt.token_ids,
                messages=prompt.messages,
                sampling=sampling,
                priority=self._priority(asked),
                user_id=call.tenant,
                model=card.key or card.id,
                salt=salt,
                slo_ttft_s=asked.slo_ttft_s,
                no_queue=asked.no_queue,
                tags=tags,
            )
            for request_id, prompt, sampling in zip(ids, work.prompts, work.samplings, strict=True)
        ]

    def _timing(self, work: GenerationCall) -> Timing:
        """Return the timing of a call."""
        # A call arrives when its body has been read: the client's upload is not the server's time.
        now = anyio.current_time()
        body: RequestBody | None = self._request.scope["state"].get("body")
        read_s = None if body is None else body.read_s
        return Timing(work.request.timeout_s, 0.0 if read_s is None else now - read_s)

    def _split(self, batch: EventBatch, hold: BudgetHold) -> tuple[EventBatch, ApiError | None]:
        """Return the events before the first unserved choice, and the error of this choice.

        Record the call's first token.
        """
        error = None
        for number, (_, event) in enumerate(batch):
            if event.finish_reason is not None:
                error = error_of(event, self._call.request_id, self._may_retry)
                if error is not None:
                    batch = batch[:number]
                    break
        if batch:  # a call without a served event must not earn a retry
            hold.first_token()
            if self._usage.first_s is None:
                self._usage.first_s = anyio.current_time()
        return batch, error

    def _may_retry(self) -> bool:
        return self._budgets.may_retry(self._call.tenant)

    @property
    def _budgets(self) -> Budgets:
        """The budgets that count the call."""
        gateway = self._gateway
        return gateway.background_budgets if self._call.is_background else gateway.budgets

    def _priority(self, asked: CompletionRequest | ChatRequest) -> int:
        if self._call.is_background:
            return PRIORITIES["background"]
        return NORMAL if asked.priority is None else asked.priority


def _answer_spec(work: GenerationCall, claimed_id: str) -> AnswerSpec:
    asked = work.request
    return AnswerSpec(
        id=work.prefix + claimed_id,
        created=int(time()),
        model=work.served.card.id,
        prompts=work.prompts,
        num_choices=asked.n,
        num_logprobs=num_logprobs(asked),
        num_prompt_logprobs=asked.prompt_logprobs,
        has_token_ids=asked.return_token_ids,
        has_usage=asked.has_usage,
        has_continuous_usage=asked.has_continuous_usage,
        is_echo=work.is_echo,
        is_prompt_only=work.is_prompt_only,
        open_parser=work.open_parser,
        has_reasoning=work.has_reasoning,
        shows_reasoning=not isinstance(asked, ChatRequest) or asked.include_reasoning,
    )
