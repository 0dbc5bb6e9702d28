"""Calls of the OpenAI API for a sequence: the body of a call, and the events of its answer."""

from typing import Any

from sagellm.client.http_calls import CHAT, COMPLETIONS
from sagellm.client.replies import Choice, ResponseBody, Usage
from sagellm.runtime.messages import FinishReason, SequenceState, Stamps, TokenEvent, TokenLogprob
from sagellm.runtime.port import EngineRefusal
from sagellm.runtime.sampling import Sampling

_STANDARD = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
# Fields that most servers have beside the API, under the names of `Sampling`: they are sent only
# where a request sets them, because a strict server refuses unknown fields.
_EXTENSIONS = (
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "stop_token_ids",
    "allowed_token_ids",
)
_DEFAULT = Sampling()
_TOKEN_ID = "token_id:"
_SEEDS = 1 << 31  # llama.cpp has seeds of 32 bits
_GRAMMARS = {"json_schema": "json", "regex": "regex", "lark": "grammar"}  # vLLM's names
_ENDS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "content_filter": "filtered",
    "tool_calls": "stop",
    "function_call": "stop",
}


def call_of(state: SequenceState, model: str, max_model_len: int) -> tuple[str, dict[str, Any]]:
    """The path and the body of the call that computes a sequence, streamed.

    A sequence that resumes sends its emitted text or tokens after the prompt. Each choice is a call
    of its own. Raises EngineRefusal for what the API has no field for.
    """
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        **_sampling_fields(state, max_model_len),
    }
    if state.prompt_token_ids:
        body["prompt"] = [*state.prompt_token_ids, *state.emitted_token_ids]
        body["return_token_ids"] = True
        return COMPLETIONS, body
    if state.messages:
        body["messages"] = [*state.messages]
        if state.num_emitted:
            body["messages"].append({"role": "assistant", "content": state.emitted_text})
            body["continue_final_message"] = True
            body["add_generation_prompt"] = False
        return CHAT, body
    body["prompt"] = state.prompt + state.emitted_text
    return COMPLETIONS, body


def _sampling_fields(state: SequenceState, max_model_len: int) -> dict[str, Any]:
    sampling = state.sampling
    if sampling.bad_words_token_ids:
        raise EngineRefusal("the engine takes no bad_words; leave them out")
    if sampling.prompt_logprobs is not None:
        raise EngineRefusal("the engine gives no log probabilities of prompts; ask for none")
    found: dict[str, Any] = {name: getattr(sampling, name) for name in _STANDARD}
    for name in _EXTENSIONS:
        value = getattr(sampling, name)
        if value != getattr(_DEFAULT, name):
            found[name] = value
    if sampling.logprobs is not None:
        found["logprobs"] = sampling.logprobs
        found["return_tokens_as_token_ids"] = True
    if sampling.bad_words:
        found["bad_words"] = sampling.bad_words
    if sampling.stop:
        found["stop"] = sampling.stop
    if sampling.logit_bias:
        found["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.grammar is not None:
        grammar = {_GRAMMARS[sampling.grammar.kind]: sampling.grammar.text}
        found["structured_outputs"] = grammar
    if sampling.seed is not None:
        # Choices are separate calls, which the server cannot tell apart: each needs a seed.
        found["seed"] = (sampling.seed + state.choice) % _SEEDS
    if sampling.max_tokens < max_model_len:  # else the server's own limit: what its context leaves
        found["max_tokens"] = sampling.max_tokens - state.num_emitted
    return found


def _logprobs(choice: Choice, number: int | None) -> tuple[TokenLogprob, ...]:
    """The log probabilities of a chunk's tokens, which `return_tokens_as_token_ids` names by ids.

    Empty if none were asked for, or if the server names its tokens by texts.
    """
    given = choice.logprobs
    if number is None or not isinstance(given, dict):
        return ()
    try:
        tops = given.get("top_logprobs") or [{}] * len(given["tokens"])
        return tuple(
            TokenLogprob(_id(token), float(logprob), _best(top or {}, number))
            for token, logprob, top in zip(
                given["tokens"], given["token_logprobs"], tops, strict=True
            )
        )
    except (KeyError, TypeError, ValueError):
        return ()


def _best(top: dict[str, float], number: int) -> tuple[tuple[int, float], ...]:
    """The `number` most likely tokens: servers add the sampled token to them."""
    named = sorted(((_id(token), value) for token, value in top.items()), key=lambda one: -one[1])
    return tuple(named[:number])


def _id(token: str) -> int:
    """The id in `token_id:17`. Raises ValueError for the text of a token."""
    if not token.startswith(_TOKEN_ID):
        raise ValueError(token)
    return int(token.removeprefix(_TOKEN_ID))


class AnswerReader:
    """Turns the chunks of one call into the events of its sequence.

    A chunk with text counts as one token, until the server reports the number of tokens at the end;
    the last event has the tokens that were missing.
    """

    def __init__(self, state: SequenceState) -> None:
        self.has_begun = False  # some tokens were emitted
        self._state = state
        self._position = state.num_emitted
        self._finish: FinishReason | None = None
        self._stop: str | int | None = None
        self._text = ""  # of the chunk that had the finish reason
        self._token_ids: tuple[int, ...] = ()
        self._logprobs: tuple[TokenLogprob, ...] = ()
        self._usage = Usage()
        self.started_s: float | None = None
        self._prefilled_s: float | None = None

    def take(self, chunk: ResponseBody, now: float) -> TokenEvent | None:
        """The event of a chunk at the time `now`; None if the chunk has no token."""
        if chunk.usage is not None:
            self._usage = chunk.usage
        if not chunk.choices:
            return None
        choice = chunk.choices[0]
        if choice.finish_reason is not None:
            # The event waits for the usage, which comes in a chunk of its own.
            self._finish = _ENDS.get(choice.finish_reason, "failed")
            self._stop = choice.stop_reason
            self._text, self._token_ids = choice.content or "", choice.token_ids or ()
            self._logprobs = _logprobs(choice, self._state.sampling.logprobs)
            return None
        return self._tokens(choice, now)

    def last(self, now: float) -> TokenEvent:
        """The last event, after the whole answer was read."""
        assert self._finish is not None
        number = len(self._token_ids)
        if not self._state.prompt_token_ids:
            known = self._position - self._state.num_emitted
            at_least = known + bool(self._text)
            number = max(self._usage.completion_tokens or at_least, at_least) - known
        if number and self._prefilled_s is None:
            self._prefilled_s = now
        is_failed = self._finish == "failed"
        return self._event(
            self._token_ids,
            number,
            self._text,
            now,
            logprobs=self._logprobs,
            finish_reason=self._finish,
            stop_reason=self._stop,
            error="the server ended the answer early" if is_failed else None,
            code="engine_failed" if is_failed else "",
        )

    def ended(self, reason: FinishReason, now: float, **fields: Any) -> TokenEvent:
        """A last event without tokens, for a call that was cancelled, refused or failed."""
        return self._event((), 0, "", now, finish_reason=reason, **fields)

    def _tokens(self, choice: Choice, now: float) -> TokenEvent | None:
        token_ids, text = choice.token_ids or (), choice.content or ""
        thought = choice.reasoning or ""
        number = len(token_ids) if self._state.prompt_token_ids else int(bool(text or thought))
        if not number and not text:
            return None
        if self._prefilled_s is None:
            self._prefilled_s = now
        self.has_begun = True
        logprobs = _logprobs(choice, self._state.sampling.logprobs)
        return self._event(token_ids, number, text, now, logprobs=logprobs)

    def _event(
        self, token_ids: tuple[int, ...], number: int, text: str, now: float, **fields: Any
    ) -> TokenEvent:
        state, position = self._state, self._position
        self._position += number
        details = self._usage.prompt_tokens_details
        return TokenEvent(
            request_id=state.request_id,
            choice=state.choice,
            epoch=state.epoch,
            position=position,
            token_ids=token_ids if state.prompt_token_ids else (),
            num_tokens_without_ids=0 if state.prompt_token_ids else number,
            text=text,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=(details.cached_tokens or 0) if details is not None else 0,
            stamps=Stamps(
                started_s=self.started_s,
                prefilled_s=self._prefilled_s,
                finished_s=now if "finish_reason" in fields else None,
            ),
            **fields,
        )

    @property
    def _num_prompt_tokens(self) -> int:
        """The tokens of the prompt. A server also counts what a resumed sequence had emitted."""
        state = self._state
        if state.prompt_token_ids:
            return len(state.prompt_token_ids)
        return max(0, (self._usage.prompt_tokens or 0) - state.num_emitted)
