"""The one object that travels through an engine: a sequence, what is known and what is computed."""

from array import array
from collections.abc import Sequence as Items

from sagellm.runtime.engine.mailbox import Mailbox
from sagellm.runtime.engine.output_text import OutputText
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

    `tokens` are prompt and output; the first `num_computed` of them have keys and values in
    `lease`. What is pending is computed next; when nothing is, a token is sampled. Preemption drops
    lease and `num_computed` and keeps `tokens`: the same code path resumes it.

    Steps under way compute the next `num_launched` tokens, and sample `num_sampling` more: pending
    is what comes after those.
    """

    __slots__ = (
        "_allowed_ids",
        "arrival",
        "choice",
        "end",
        "fence",
        "found",
        "keys",
        "lease",
        "mailbox",
        "max_output",
        "num_cached",
        "num_computed",
        "num_launched",
        "num_preemptions",
        "num_prompt",
        "num_sampling",
        "num_scored",
        "output_text",
        "rank",
        "sampling",
        "scores",
        "stamps",
        "state",
        "stop_ids",
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
        self.fence = Fence(state.request_id, state.choice, state.epoch)
        self.arrival = arrival
        self.rank = (state.priority, arrival)  # who goes first; the last in rank is preempted first
        self.mailbox = mailbox
        self.tokens = [*state.prompt_token_ids, *state.emitted_token_ids]
        self.num_prompt = len(state.prompt_token_ids)
        self.num_computed = 0
        self.num_launched = 0
        self.num_sampling = 0
        self.num_preemptions = 0
        self.lease: Lease | None = None
        self.keys: list[BlockKey] = []  # of its full blocks, as far as they were asked for
        self.found: list[PrefixNode] = []  # while it waits: the prefix that need not be computed
        self.num_cached: int | None = None  # prompt tokens that it found when it first got blocks
        self.max_output = max_output  # by max_tokens and by the context limit
        self.stop_ids = stop_ids
        self.output_text = output_text
        self.stamps = UNSTARTED
        self.end: FinishReason | None = None  # why it ends before its answer does
        # Prompt tokens that need no logprob (any more); the first has none.
        self.num_scored = 1 if _is_to_be_scored(state) else self.num_prompt
        self.scores: list[TokenLogprob] = []
        self._allowed_ids: array[int] | None = None

    @property
    def num_known(self) -> int:
        """Tokens, and those that steps under way sample."""
        return len(self.tokens) + self.num_sampling

    @property
    def num_scheduled(self) -> int:
        """Tokens whose keys and values are computed, or being computed."""
        return self.num_computed + self.num_launched

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values no step computes yet: known ones less scheduled ones."""
        return len(self.tokens) + self.num_sampling - self.num_computed - self.num_launched

    @property
    def num_uncomputed(self) -> int:
        """Tokens without keys and values, those under way among them."""
        return len(self.tokens) - self.num_computed

    @property
    def is_ending(self) -> bool:
        """Whether no step is to come after those under way, whatever they sample."""
        if self.end is not None:
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
        """`allowed_token_ids` of its sampling as plain numbers, made when they are first read: a
        long tuple takes milliseconds to convert, and every step reads it.
        """
        if self._allowed_ids is None:
            self._allowed_ids = array("q", self.state.sampling.allowed_token_ids)
        return self._allowed_ids

    @property
    def is_scoring(self) -> bool:
        """Whether logprobs of the prompt are wanted that are not known yet."""
        return self.num_scored < self.num_prompt

    def unscored(self, query_len: int) -> range:
        """Positions whose logprobs the next `query_len` pending tokens give: a token's logits are
        those of the token behind it. What is computed again after a preemption is not scored again.
        """
        start, end = self.num_scheduled + 1, self.num_scheduled + query_len + 1
        return range(max(start, self.num_scored), min(end, self.num_prompt))

    def add_prompt_logprobs(self, positions: range, scores: list[TokenLogprob]) -> None:
        self.scores += scores
        self.num_scored = positions.stop

    def take_prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        """The prompt's logprobs, for the first event; afterwards they are forgotten."""
        if not self.scores:
            return ()
        scores, self.scores = tuple(self.scores), []
        return scores

    def adopt(self, lease: Lease) -> None:
        """Begin behind the tokens that an imported, or held, lease covers."""
        self.lease = lease
        self.num_computed = lease.num_tokens
        self.num_cached = 0  # whoever computed them has said so

    def mark_prefilled(self, now: float) -> None:
        """The prompt is computed, and its first token sampled."""
        self.stamps = Stamps(started_s=self.stamps.started_s, prefilled_s=now)

    def event(
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
        """An event of this sequence, with its stamps so far."""
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

    def take(self, token_ids: Items[int]) -> tuple[int, str, FinishReason | None, str | int | None]:
        """Append sampled tokens up to the one that ends the answer: how many were taken, and
        `check_stop` of them all. Keys and values of all but the last are computed.
        """
        text, reason, stop_reason, num_taken = "", None, None, 0
        for token_id in token_ids:
            self.tokens.append(token_id)
            num_taken += 1
            fresh, reason, stop_reason = self.check_stop(token_id)
            text += fresh
            if reason is not None:
                break
        self.num_computed += num_taken - 1
        return num_taken, text, reason, stop_reason

    def check_stop(self, token_id: int) -> tuple[str, FinishReason | None, str | int | None]:
        """What the newest token means: showable text, why the answer ends (if so), what matched.

        The text of a stop token itself is not shown unless the sampling says so; an end-of-text
        token is no stop reason of its own, as in the OpenAI API.
        """
        if token_id in self.stop_ids and self.num_output > self.sampling.min_tokens:
            named = token_id in self.sampling.stop_token_ids
            shown = self._show(token_id) if self.sampling.include_stop_str_in_output else ("", None)
            return shown[0] + self._rest()[0], "stop", token_id if named else None
        text, matched = self._show(token_id)
        if matched is None and self.num_output >= self.max_output:
            rest, matched = self._rest()
            text += rest
            return text, "stop" if matched else "length", matched
        return text, "stop" if matched else None, matched

    def rest(self) -> str:
        """Text that was held back, where the answer ends without another token."""
        return self._rest()[0]

    def _show(self, token_id: int) -> tuple[str, str | None]:
        return self.output_text.push(token_id) if self.output_text else ("", None)

    def _rest(self) -> tuple[str, str | None]:
        return self.output_text.finish() if self.output_text else ("", None)


def _is_to_be_scored(state: SequenceState) -> bool:
    """A resumed sequence gave the logprobs of its prompt before its first token."""
    return state.sampling.prompt_logprobs is not None and not state.emitted_token_ids
