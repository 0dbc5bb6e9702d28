"""A call that generates: its prompts enter the graph, its answer leaves as a stream or whole."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import time

import anyio
import anyio.lowlevel
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers.event_stream import DONE, EventStream, EventWriter, attended
from sagellm.gateway.answers.logprobs import TokenNames
from sagellm.gateway.answers.writer import (
    AnswerSpec,
    AnswerWriter,
    EventBatch,
    MakeAnswerForm,
    UsageCounter,
    error_of,
)
from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.encoding import EncodedPrompt
from sagellm.gateway.gateway import Gateway, Hold, HostedModel
from sagellm.gateway.graph_bridge import GraphRequest, entered
from sagellm.gateway.http.call import Call
from sagellm.gateway.http.checks import RequestBody
from sagellm.gateway.protocol.bodies import ChatRequest, CompletionRequest
from sagellm.gateway.protocol.sampling_params import far_too_long, fitted, num_logprobs, sampling_of
from sagellm.runtime.messages import NORMAL, Sampling

CLIENT_LEFT = 499  # for the log: nobody is there to read it


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationCall:
    """A checked call: one sampling a prompt; `prefix` is that of the answer's id."""

    request: CompletionRequest | ChatRequest
    served: HostedModel
    prompts: tuple[EncodedPrompt, ...]
    samplings: tuple[Sampling, ...]
    make_form: MakeAnswerForm
    prefix: str
    is_echo: bool = False
    is_prompt_only: bool = False


async def encoded(
    served: HostedModel, asked: CompletionRequest | ChatRequest, text: str
) -> tuple[int, ...]:
    """The tokens of a text of the call. Raises ApiError, for a text far beyond the context before
    all of it is tokenised.
    """
    facts = served.facts
    is_kept = asked.truncate_prompt_tokens is None
    param = "messages" if isinstance(asked, ChatRequest) else "prompt"
    if is_kept and await served.encoder.exceeds(text, facts.max_model_len, param=param):
        raise far_too_long(asked, facts)
    add = asked.add_special_tokens
    return await served.encoder.text(text, add_special_tokens=add, param=param)


async def samplings_of(
    served: HostedModel, asked: CompletionRequest | ChatRequest, prompts: Sequence[EncodedPrompt]
) -> tuple[Sampling, ...]:
    """One a prompt, bad words as token ids. Raises ApiError.

    Ids and texts are checked once, and shared: a request may have 262,144 of them.
    """
    facts = served.facts
    sampling = sampling_of(asked, facts, len(prompts[0].token_ids))
    if asked.bad_words and not facts.takes_text:
        banned = await served.encoder.banned(asked.bad_words)
        sampling = msgspec.structs.replace(sampling, bad_words=(), bad_words_token_ids=banned)
    samplings = [sampling]
    for prompt in prompts[1:]:
        await anyio.lowlevel.checkpoint()
        samplings.append(fitted(sampling, asked, facts, len(prompt.token_ids)))
    return tuple(samplings)


async def respond(gateway: Gateway, request: Request, work: GenerationCall) -> Response:
    """The answer, streamed or whole. Raises ApiError where nothing of it can be served."""
    tally = request.state.tally = UsageCounter()  # for the log, whatever becomes of the call
    body: RequestBody | None = request.scope["state"].get("body")
    read_s = body.read_s if body is not None else None
    running = _Running(gateway, request.state.call, work, tally, read_s)
    on_gone = gateway.meters.disconnected
    if work.request.stream:
        return EventStream(running.tell, gateway.settings.streaming, on_gone)
    content = await attended(request.receive, running.whole)
    if content is None:
        on_gone()
        return Response(status_code=CLIENT_LEFT)
    return Response(content, media_type="application/json")


class _Running:
    """One call between its start and its end."""

    def __init__(
        self,
        gateway: Gateway,
        call: Call,
        work: GenerationCall,
        tally: UsageCounter,
        read_s: float | None,
    ) -> None:
        """`read_s`: when its body was read."""
        self._gateway = gateway
        self._read_s = read_s
        self._call = call
        self._work = work
        self._tally = tally

    async def tell(self, outlet: EventWriter) -> None:
        """Stream. A refusal before the first event is raised, so that it has its own status."""
        with self._started() as (ids, reply, hold):
            async with entered(self._gateway.bridge, self._entries(ids)) as batches:
                last = b""  # as a rule only the end is missing behind it, and goes along
                async for batch in batches:
                    served, error = self._split(batch)
                    if served:  # a refusal pays for no retry
                        self._came(hold)
                    if error is not None and not outlet.is_started:
                        raise error
                    content = last + (reply.chunks(served) if served else b"")
                    last = content if reply.is_finished and error is None else b""
                    if content and not last:
                        await outlet.send(content)
                    if error is not None:
                        raise error
            _check_finished(reply)
            await outlet.send(last + reply.ending() + DONE, is_last=True)

    async def whole(self) -> bytes:
        with self._started() as (ids, reply, hold):
            async with entered(self._gateway.bridge, self._entries(ids)) as batches:
                async for batch in batches:
                    served, error = self._split(batch)
                    if served:  # a refusal pays for no retry
                        self._came(hold)
                    if error is not None:
                        raise error
                    reply.add(served)
            _check_finished(reply)
            return reply.whole()

    def _came(self, hold: Hold) -> None:
        hold.first_token()
        if self._tally.first_s is None:
            self._tally.first_s = anyio.current_time()

    @contextmanager
    def _started(self) -> Iterator[tuple[tuple[str, ...], AnswerWriter, Hold]]:
        """Ids for the graph, where the answer is gathered, and places in the tenant's budget."""
        gateway, work = self._gateway, self._work
        wanted = work.request.request_id or self._call.request_id
        with (
            gateway.budgets.hold(self._call.tenant, len(work.prompts) * work.request.n) as hold,
            gateway.claim(wanted, len(work.prompts)) as claimed,
        ):
            asked = self._asked(claimed.id)
            names = work.request.return_tokens_as_token_ids
            texts = TokenNames(work.served.tokens) if names else work.served.tokens
            reply = AnswerWriter(asked, work.make_form(asked, texts), self._tally)
            yield claimed.request_ids, reply, hold

    def _asked(self, claimed_id: str) -> AnswerSpec:
        work, request = self._work, self._work.request
        return AnswerSpec(
            id=work.prefix + claimed_id,
            created=int(time()),
            model=work.served.card.id,
            prompts=work.prompts,
            num_choices=request.n,
            num_logprobs=num_logprobs(request),
            num_prompt_logprobs=request.prompt_logprobs,
            has_token_ids=request.return_token_ids,
            has_usage=request.has_usage,
            has_continuous_usage=request.has_continuous_usage,
            is_echo=work.is_echo,
            is_prompt_only=work.is_prompt_only,
        )

    def _entries(self, ids: Sequence[str]) -> list[GraphRequest]:
        request, call, gateway = self._work.request, self._call, self._gateway
        card = self._work.served.card
        salt = gateway.salt_of(call.tenant, request.cache_salt)
        now = anyio.current_time()
        waited_s = now - (now if self._read_s is None else self._read_s)
        return [
            GraphRequest(
                request_id=request_id,
                text=prompt.text,
                token_ids=prompt.token_ids,
                messages=prompt.messages,
                sampling=sampling,
                priority=NORMAL if request.priority is None else request.priority,
                tenant=call.tenant,
                model=card.key or card.id,
                salt=salt,
                slo_ttft_s=request.slo_ttft_s,
                timeout_s=request.timeout_s,
                waited_s=waited_s,
                trace=call.traceparent,
                operation="chat" if self._work.prefix == "chatcmpl-" else "text_completion",
            )
            for request_id, prompt, sampling in zip(
                ids, self._work.prompts, self._work.samplings, strict=True
            )
        ]

    def _split(self, batch: EventBatch) -> tuple[EventBatch, ApiError | None]:
        """What came before the first event that says that its choice was not served; and why."""
        for number, (_, event) in enumerate(batch):
            if event.finish_reason is not None:
                error = error_of(event, self._call.request_id, self._may_retry)
                if error is not None:
                    return batch[:number], error
        return batch, None

    def _may_retry(self) -> bool:
        return self._gateway.budgets.may_retry(self._call.tenant)


def _check_finished(reply: AnswerWriter) -> None:
    """An answer never ends as if it were whole."""
    if not reply.is_finished:
        raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=1.0)
