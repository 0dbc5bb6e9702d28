"""The object that travels through an engine: a sequence, its tokens, and how many are computed."""

from array import array
from collections.abc import Sequence as Items

import msgspec

from sagellm.backends import Sampled
from sagellm.backends.step import Matcher, takes_largest
from sagellm.runtime.engine.output import Mailbox, OutputText
from sagellm.runtime.kv.lease import Fence, Lease
from sagellm.runtime.kv.prefix_tree import BlockKey, PrefixNode
from sagellm.runtime.messages import (
    FinishReason,
    SequenceState,
    Stamps,
    TokenEvent,
    TokenLogprob,
)

UNSTARTED = Stamps()


class Sequence:
    """A submitted `SequenceState` while the engine works on it.

    `tokens` are prompt and output. The first `num_computed` tokens have keys and values in `lease`.
    Pending tokens are computed next; when no token is pending, a token is sampled. Preemption drops
    `lease` and `num_computed` and keeps `tokens`, so a preempted sequence resumes on the same code
    path.

    Launched steps compute the next `num_launched` tokens after the computed tokens, and sample
    `num_sampling` more tokens. Tokens after the launched tokens are pending.
    """

    __slots__ = (
        "_allowed_ids", "arrival", "cached_prefix", "choice", "fence", "forced_end", "is_plain",
        "keys", "lease", "mailbox", "matcher", "max_output", "num_cached", "num_computed",
        "num_launched", "num_preemptions", "num_prompt", "num_sampling", "num_scored",
        "output_text", "prompt_logprobs", "rank", "sampling", "stamps", "state", "stop_ids",
        "tokens",
    )  # fmt: skip

    def __init__(
        self,
        state: SequenceState,
        *,
        arrival: int,
        mailbox: Mailbox,
        max_output: int,
        stop_ids: frozenset[int],
        output_text: OutputText | None,
    ) -> None:
        self.state = state
        self.choice = state.choice
        self.sampling = state.sampling
        self.is_plain = takes_largest(state.sampling)  # asked once: it is read in each step
        self.fence = Fence(state.request_id, state.choice, state.epoch)
        self.arrival = arrival
        self.rank = (state.priority, arrival)  # the lowest goes first, the highest is preempted
        self.mailbox = mailbox
        self.tokens = [*state.prompt_token_ids, *state.emitted_token_ids]
        self.num_prompt = len(state.prompt_token_ids)
        self.num_computed = 0
        self.num_launched = 0
        self.num_sampling = 0
        self.num_preemptions = 0
        self.lease: Lease | None = None
        self.keys: list[BlockKey] = []  # of full blocks, hashed when first needed
        self.cached_prefix: list[PrefixNode] = []  # published blocks found while the sequence waits
        self.num_cached: int | None = None  # prompt tokens reused when blocks were first leased
        self.max_output = max_output  # by max_tokens and by the context limit
        self.stop_ids = stop_ids
        self.output_text = output_text
        self.stamps = UNSTARTED
        self.forced_end: FinishReason | None = None  # ends the sequence before its answer is whole
        # Prompt tokens whose logprob is computed, or is not wanted. The first token has no logprob.
        self.num_scored = 1 if _wants_prompt_logprobs(state) else self.num_prompt
        self.prompt_logprobs: list[TokenLogprob] = []
        self._allowed_ids: array[int] | None = None
        self.matcher: Matcher | None = None  # set once the grammar is compiled

    @property
    def num_known(self) -> int:
        """The number of tokens, including tokens that launched steps are sampling."""
        return len(self.tokens) + self.num_sampling

    @property
    def num_scheduled(self) -> int:
        """Tokens whose keys and values are computed, or being computed."""
        return self.num_computed + self.num_launched

    @property
    def num_pending(self) -> int:
        """Known tokens less scheduled tokens: no step computes their keys and values yet."""
        return len(self.tokens) + self.num_sampling - self.num_computed - self.num_launched

    @property
    def num_uncomputed(self) -> int:
        """Tokens without keys and values, launched tokens included."""
        return len(self.tokens) - self.num_computed

    @property
    def is_ending(self) -> bool:
        """Whether the sequence ends with its launched steps, whatever they sample."""
        if self.forced_end is not None:
            return True
        if not self.num_sampling:
            return False
        return self.num_known - self.num_prompt >= self.max_output or self.state.hold_kv

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def allowed_ids(self) -> "array[int]":
        """`allowed_token_ids` of the sampling options, as an array."""
        # Converted once: a long tuple takes milliseconds to convert, and every step reads the ids.
        if self._allowed_ids is None:
            self._allowed_ids = array("q", self.state.sampling.allowed_token_ids)
        return self._allowed_ids

    def adopt(self, lease: Lease) -> None:
        """Take over an imported or held lease. Computing begins after the tokens that it covers."""
        self.lease = lease
        self.num_computed = lease.num_tokens
        self.num_cached = 0  # the engine that computed the tokens has counted its cached tokens

    # ---- prompt logprobs -----------------------------------------------------------------------

    @property
    def is_scoring(self) -> bool:
        """Whether wanted logprobs of the prompt are still to be computed."""
        return self.num_scored < self.num_prompt

    def unscored(self, query_len: int) -> range:
        """The prompt positions that are scored if the next `query_len` pending tokens are computed:
        the logits of a token score the next token. Tokens computed again after a preemption are not
        scored again.
        """
        start, end = self.num_scheduled + 1, self.num_scheduled + query_len + 1
        return range(max(start, self.num_scored), min(end, self.num_prompt))

    def add_prompt_logprobs(self, positions: range, logprobs: list[TokenLogprob]) -> None:
        self.prompt_logprobs += logprobs
        self.num_scored = positions.stop

    def take_prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Return the prompt's logprobs, for the first event, and drop them."""
        if not self.prompt_logprobs:
            return ()
        logprobs, self.prompt_logprobs = tuple(self.prompt_logprobs), []
        return logprobs

    # ---- output --------------------------------------------------------------------------------

    def accept(self, sampled: Sampled, rows: range, now: float) -> TokenEvent:
        """Append the tokens of these rows of `sampled` up to a stop, and return their event."""
        position = self.num_output
        token_ids = sampled.token_ids[rows.start : rows.stop]
        num_taken, text, reason, stop_reason = self.append(token_ids)
        if not position:  # the first token: the prompt is computed
            self.stamps = Stamps(started_s=self.stamps.started_s, prefilled_s=now)
        if reason is not None:
            self.stamps = msgspec.structs.replace(self.stamps, finished_s=now)
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampled.logprobs:
            found = sampled.logprobs_of(rows[:num_taken])
            logprobs = tuple(TokenLogprob(*logprob) for logprob in found)
        return self._event(
            position=position,
            token_ids=tuple(token_ids[:num_taken]),
            text=text,
            logprobs=logprobs,
            prompt_logprobs=self.take_prompt_logprobs(),
            finish_reason=reason,
            stop_reason=stop_reason,
        )

    def last_event(self, now: float, reason: FinishReason) -> TokenEvent:
        """Create the event that ends a sequence without a last token. After "stop" it has the text
        that was still held back.
        """
        self.stamps = msgspec.structs.replace(self.stamps, finished_s=now)
        return self._event(
            position=self.num_output,
            text=self._held_text()[0] if reason == "stop" else "",
            prompt_logprobs=self.take_prompt_logprobs() if reason == "stop" else (),
            finish_reason=reason,
        )

    def _event(
        self,
        *,
        position: int,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        logprobs: tuple[TokenLogprob, ...] = (),
        prompt_logprobs: tuple[TokenLogprob, ...] = (),
        finish_reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
    ) -> TokenEvent:
        # CPython makes a dict of more than 15 keyword arguments: such a call takes three times
        # as long.
        return TokenEvent(
            request_id=self.state.request_id,
            choice=self.state.choice,
            epoch=self.state.epoch,
            position=position,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_prompt_tokens=self.num_prompt,
            num_cached_tokens=self.num_cached or 0,
            num_preemptions=self.num_preemptions,
            stamps=self.stamps,
        )

    def append(
        self, token_ids: Items[int]
    ) -> tuple[int, str, FinishReason | None, str | int | None]:
        """Append sampled tokens up to the token that ends the answer. Return the number of tokens
        taken, and what `check_stop` returns for all of them.
        """
        text, reason, stop_reason, num_taken = "", None, None, 0
        for token_id in token_ids:
            self.tokens.append(token_id)
            num_taken += 1
            fresh, reason, stop_reason = self.check_stop(token_id)
            text += fresh
            if reason is not None:
                break
        # Each token but the last was a draft, whose keys and values the step has computed.
        self.num_computed += num_taken - 1
        return num_taken, text, reason, stop_reason

    def check_stop(self, token_id: int) -> tuple[str, FinishReason | None, str | int | None]:
        """Check whether the newest token ends the answer. Return the text that may be shown, the
        finish reason or None, and the stop string or stop token that matched, or None.

        The text of a stop token is shown only with `include_stop_str_in_output`. An end-of-text
        token is not reported as a stop reason, as in the OpenAI API.
        """
        if token_id in self.stop_ids and self.num_output > self.sampling.min_tokens:
            named = token_id in self.sampling.stop_token_ids
            shown = self._show(token_id) if self.sampling.include_stop_str_in_output else ("", None)
            return shown[0] + self._held_text()[0], "stop", token_id if named else None
        text, matched = self._show(token_id)
        if matched is None and self.num_output >= self.max_output:
            rest, matched = self._held_text()
            text += rest
            return text, "stop" if matched else "length", matched
        return text, "stop" if matched else None, matched

    def _show(self, token_id: int) -> tuple[str, str | None]:
        return self.output_text.push(token_id) if self.output_text else ("", None)

    def _held_text(self) -> tuple[str, str | None]:
        """Return the text that was held back, and the stop string in it, or None. No token may
        follow.
        """
        return self.output_text.finish() if self.output_text else ("", None)


def _wants_prompt_logprobs(state: SequenceState) -> bool:
    """Whether logprobs of the prompt are wanted. A resumed sequence has reported them already, with
    its first token.
    """
    return state.sampling.prompt_logprobs is not None and not state.emitted_token_ids
