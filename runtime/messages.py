"""What travels: requests forward, tokens back, and the state of a sequence into an engine."""

from types import NoneType
from typing import Any, Literal, TypeAlias

import msgspec

FinishReason: TypeAlias = Literal[
    "stop", "length", "cancelled", "refused", "expired", "failed", "filtered"
]
# Why a request ended, for programs: what a gateway answers, and whether a retry may help.
CODES: dict[str, str] = {
    "bad_request": "the request itself cannot be served",
    "queue_full": "too many requests or tokens wait",
    "slo_unreachable": "its first token would come too late",
    "slow_reader": "its reader did not read",
    "shutting_down": "the graph is being closed",
    "unavailable": "no engine is there that could serve it",
    "request_quarantined": "engines died of it, or of its like",
    "operator_failed": "an operator, or a function that it calls, raised",
    "engine_failed": "engines, or the links between them, failed while they computed it",
}
OPERATOR_FAILED = "operator_failed"
ENGINE_FAILED = "engine_failed"
SERVED: frozenset[str] = frozenset({"stop", "length"})  # the reasons that mean an answer

PRIORITIES = {"critical": 0, "high": 1, "normal": 2, "low": 3, "background": 4}
NORMAL = PRIORITIES["normal"]


_WHOLE, _NUMBER = "a whole number", "a number"
_SAMPLING_NUMBERS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    *((name, (int,), _WHOLE) for name in ("max_tokens", "min_tokens", "top_k", "n")),
    *((name, (int, NoneType), _WHOLE) for name in ("seed", "logprobs", "prompt_logprobs")),
    *(
        (name, (int, float), _NUMBER)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                     "frequency_penalty")
    ),
)  # fmt: skip
_SAMPLING_OTHERS: tuple[tuple[str, type | tuple[type, ...], str], ...] = (
    ("logit_bias", dict, "a dict of token ids and numbers"),
    ("stop", (tuple, list), "a tuple of strings"),
    ("stop_token_ids", (tuple, list), "a tuple of token ids"),
    ("allowed_token_ids", (tuple, list), "a tuple of token ids"),
    ("bad_words", (tuple, list), "a tuple of strings"),
    ("bad_words_token_ids", (tuple, list), "a tuple of tuples of token ids"),
    ("ignore_eos", bool, "True or False"),
    ("skip_special_tokens", bool, "True or False"),
    ("include_stop_str_in_output", bool, "True or False"),
)
_RIGHT_KINDS: set[tuple[type, ...]] = set()  # types of all values, as were right before
_MOST_KINDS = 256


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to sample tokens. Greedy unless a temperature is given; names as in the OpenAI API.

    `seed` None means: the session draws one where the request enters. `top_k` 0 means all.
    `allowed_token_ids` empty means all. No answer completes a sequence of `bad_words_token_ids`;
    the session resolves `bad_words`, which are texts, to such sequences. Where no token is left to
    sample, the answer ends with reason "stop".
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the chosen token's and the k most likely
    prompt_logprobs: int | None = None  # the same for the prompt's tokens, in the first event
    n: int = 1

    def __post_init__(self) -> None:
        """Raises TypeError for a value of a wrong type. Ranges are checked by `fault_of`."""
        kinds = tuple(map(type, msgspec.structs.astuple(self)))
        if kinds not in _RIGHT_KINDS:
            self._check_types()
            if len(_RIGHT_KINDS) < _MOST_KINDS:
                _RIGHT_KINDS.add(kinds)

    def _check_types(self) -> None:
        for name, kinds, wanted in _SAMPLING_NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, kinds) or (value is True or value is False):
                raise TypeError(f"{name} is {value!r}; it must be {wanted}")
        for name, kind, wanted in _SAMPLING_OTHERS:
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")


class Stamps(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """When each phase of a request ended, in seconds of the executor's monotonic clock."""

    arrived_s: float = 0.0
    dispatched_s: float | None = None  # left the queue of policy_sort
    started_s: float | None = None  # an engine began to compute it
    prefilled_s: float | None = None  # its first token was sampled
    transferred_s: float | None = None  # its KV blocks reached the decode pool
    finished_s: float | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """One choice of one request on its way to an engine. (request_id, choice) names it.

    `prompt_token_ids` is empty, and `prompt` or `messages` is what its engine encodes, where that
    takes text. It resumes with `emitted_token_ids`, or with `emitted_text`, which was
    `num_emitted_without_ids` tokens.
    """

    request_id: str
    choice: int = 0
    epoch: int = 0  # raised when a request re-enters; with the id the fence of its leases
    prompt: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    priority: int = NORMAL  # 0 critical ... 4 background
    user_id: str = ""
    model: str = ""
    salt: str = ""  # of the tenant: prefix blocks are shared inside one salt only
    slo_ttft_s: float | None = None  # objective for the first token, from arrival
    expires_s: float | None = None  # clock time after which nobody wants the answer
    cost_budget: float | None = None
    placement: dict[str, int] = {}  # node name -> replica, as route chose
    avoid: tuple[tuple[str, int], ...] = ()  # engines and replicas that have failed on it
    num_cached_tokens: int = 0  # of the prompt, as far as the router knows
    emitted_token_ids: tuple[int, ...] = ()
    emitted_text: str = ""
    num_emitted_without_ids: int = 0
    stamps: Stamps = Stamps()
    tags: dict[str, str] = {}

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.choice

    @property
    def num_emitted(self) -> int:
        """Tokens of the answer that were emitted already; where there are any, it resumes."""
        return len(self.emitted_token_ids) + self.num_emitted_without_ids

    @property
    def num_uncached_tokens(self) -> int:
        """Tokens that a prefill has to compute."""
        known = len(self.prompt_token_ids) + len(self.emitted_token_ids)
        return known - self.num_cached_tokens

    def sequence(
        self, owner: str, *, hold_kv: bool = False, lease: "LeaseRef | None" = None
    ) -> "SequenceState":
        """What an engine is given of this request by the operator `owner`."""
        return SequenceState(
            owner=owner,
            request_id=self.request_id,
            choice=self.choice,
            epoch=self.epoch,
            prompt="" if self.prompt_token_ids else self.prompt,
            messages=self.messages,
            prompt_token_ids=self.prompt_token_ids,
            emitted_token_ids=self.emitted_token_ids,
            emitted_text=self.emitted_text,
            num_emitted_without_ids=self.num_emitted_without_ids,
            sampling=self.sampling,
            salt=self.salt,
            hold_kv=hold_kv,
            lease=lease,
            priority=self.priority,
            expires_s=self.expires_s,
        )


class SequenceState(msgspec.Struct, frozen=True, kw_only=True, tag="sequence"):
    """All that an engine needs to start, or to resume, one sequence. Versioned: crosses processes.

    The prompt is `prompt_token_ids`, or for an engine that takes text `prompt` or `messages`. With
    `emitted_token_ids`, or `emitted_text` of `num_emitted_without_ids` tokens, the sequence resumes
    after them. `owner` is the operator that the events go to. `hold_kv`: stop after the first token
    and keep the lease for an export. `lease`: the blocks, in this engine's own pool, that already
    hold the prompt's keys and values.
    """

    version: int = 1
    owner: str
    request_id: str
    choice: int = 0
    epoch: int = 0
    prompt: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    emitted_token_ids: tuple[int, ...] = ()
    emitted_text: str = ""
    num_emitted_without_ids: int = 0
    sampling: Sampling = Sampling()  # with the seed resolved
    salt: str = ""
    adapter: str | None = None
    grammar: str | None = None
    task: Literal["generate", "embed"] = "generate"
    hold_kv: bool = False
    lease: "LeaseRef | None" = None
    priority: int = NORMAL
    expires_s: float | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.choice

    @property
    def num_emitted(self) -> int:
        """The position of the next token."""
        return len(self.emitted_token_ids) + self.num_emitted_without_ids


class LeaseRef(msgspec.Struct, frozen=True, kw_only=True, tag="lease"):
    """Names a lease of one pool from outside it. (request_id, choice, epoch) is its fence."""

    engine: str
    replica: int
    lease_id: int
    request_id: str
    choice: int
    epoch: int
    num_tokens: int  # whose keys and values the blocks hold, or will hold


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """The log probability of a chosen token, and the most likely ones, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None  # 1: none is more likely; known of prompt tokens only


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, tag="tokens", gc=False):
    """New tokens of one choice, or its end, or both; `position` is that of its first token.

    The last event of a choice, and no other, has a `finish_reason`. `text` is what became whole
    with these tokens: it may be empty, and never ends inside a character. Tokens whose ids are not
    known, as their engine gives text alone, are counted by `num_tokens_without_ids`.
    """

    request_id: str
    choice: int = 0
    epoch: int = 0
    position: int = 0
    token_ids: tuple[int, ...] = ()
    num_tokens_without_ids: int = 0
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of the prompt's tokens but the first
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token id that matched
    error: str | None = None  # why it was refused or failed; safe to show
    code: str = ""  # the same for programs: a key of CODES, or nothing
    retry_after_s: float | None = None  # when a refused request may be tried again
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0  # of the sequence, in the engine that the event comes from
    stamps: Stamps = Stamps()

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.choice

    @property
    def num_tokens(self) -> int:
        """Tokens of the event, with and without ids."""
        return len(self.token_ids) + self.num_tokens_without_ids

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None


class Prefilled(msgspec.Struct, frozen=True, kw_only=True, tag="prefilled"):
    """A request whose prompt is computed: its first token and where its KV blocks are.

    `lease` is the filled one in the prefill pool (None once it was handed over, or where the first
    token was the last); `reservation` is the one reserved for it in the decode pool.
    """

    request: Request
    first: TokenEvent
    lease: LeaseRef | None = None
    reservation: LeaseRef | None = msgspec.field(default=None, name="landing")

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def choice(self) -> int:
        return self.request.choice

    @property
    def key(self) -> tuple[str, int]:
        return self.request.key


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag="answer"):
    """The whole answer of one choice; `value` is what a user's function made of it, if any did."""

    request_id: str
    choice: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    num_tokens_without_ids: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason = "stop"
    stop_reason: str | int | None = None
    error: str | None = None
    code: str = ""
    retry_after_s: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    stamps: Stamps = Stamps()
    value: object = None

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.choice

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer, with and without ids."""
        return len(self.token_ids) + self.num_tokens_without_ids

    @property
    def is_last(self) -> bool:
        return True


class Forked(msgspec.Struct, frozen=True, kw_only=True, tag="forked"):
    """Tells the session that one request became the choices 0 ... num_choices - 1."""

    request_id: str
    num_choices: int


Item: TypeAlias = Request | Prefilled | TokenEvent | Answer


def refusal(
    request: Request,
    reason: FinishReason,
    *,
    now: float,
    error: str | None = None,
    code: str = "",
    retry_after_s: float | None = None,
) -> TokenEvent:
    """The terminal event of a request that ends before an engine took it."""
    stamps = msgspec.structs.replace(request.stamps, finished_s=now)
    return TokenEvent(
        request_id=request.request_id,
        choice=request.choice,
        epoch=request.epoch,
        position=request.num_emitted,
        finish_reason=reason,
        error=error,
        code=code,
        retry_after_s=retry_after_s,
        num_prompt_tokens=len(request.prompt_token_ids),
        stamps=stamps,
    )
