"""The messages between operators (requests, tokens, answers), and the sequences for engines."""

from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

from sagellm.runtime.sampling import Sampling

FinishReason: TypeAlias = Literal[
    "stop", "length", "cancelled", "refused", "expired", "failed", "filtered"
]
# Machine-readable reasons of an end: a gateway chooses HTTP status and retry advice by the code.
CODES: dict[str, str] = {
    "bad_request": "the request itself cannot be served",
    "invalid_grammar": "the grammar of its answer cannot be compiled, or exceeds its limits",
    "queue_full": "too many requests or tokens wait",
    "slo_unreachable": "its first token, or its later tokens, would come too late",
    "decode_full": "too many sequences would decode when its prompt is computed",
    "concurrency_limit": "too many requests are in service for first tokens to come in time",
    "would_wait": "it would have to wait, and asked not to",
    "slow_reader": "its reader did not read",
    "shutting_down": "the graph is being closed",
    "unavailable": "no engine that could serve it is up",
    "request_quarantined": "it, or an equal request, may have crashed two engines",
    "operator_failed": "an operator, or a function that it calls, raised",
    "engine_failed": "engines, or the links between them, failed while they computed it",
}
WOULD_WAIT = "it would have to wait, and it asked not to: try again later"
OPERATOR_FAILED = "operator_failed"
ENGINE_FAILED = "engine_failed"
# (request_id, choice). A plain tuple: one is made for every token, and a NamedTuple costs 0.3 us.
ChoiceKey: TypeAlias = tuple[str, int]
SERVED: frozenset[str] = frozenset({"stop", "length"})  # the reasons of a complete answer

PRIORITIES = {"critical": 0, "high": 1, "normal": 2, "low": 3, "background": 4}
NORMAL = PRIORITIES["normal"]


class EngineReplica(NamedTuple):
    """The name of an engine, and the number of one of its replicas."""

    engine: str
    number: int


class Stamps(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The end of each phase of a request, in seconds of the executor's monotonic clock."""

    arrived_s: float = 0.0
    dispatched_s: float | None = None  # left the queue of policy_sort
    started_s: float | None = None  # an engine began to compute the prompt
    prefilled_s: float | None = None  # the first token was sampled
    transferred_s: float | None = None  # the KV blocks reached the decode pool
    finished_s: float | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """One choice of one request on its way to an engine, identified by (request_id, choice).

    For an engine that takes text, `prompt_token_ids` is empty and the engine encodes `prompt` or
    `messages`. A request whose answer was begun elsewhere resumes after its emitted tokens. These
    are `emitted_token_ids`, or for an engine without token ids `emitted_text`, a text of
    `num_emitted_without_ids` tokens.

    `texts`: the token ids of each text of a request to embed, from which the session makes a choice
    each; empty in the graph. `dimensions`: the length of the vectors; None: the model's own.
    """

    request_id: str
    choice: int = 0
    epoch: int = 0  # rises when the request enters again: leases of older epochs are invalid
    prompt: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    priority: int = NORMAL  # 0 critical ... 4 background
    can_be_preempted: bool | None = None  # False: its place goes to no request of a higher class
    user_id: str = ""
    model: str = ""
    salt: str = ""  # the tenant's: prefix blocks are shared only by requests with equal salts
    slo_ttft_s: float | None = None  # TTFT objective, counted from arrival
    no_queue: bool = False  # refuse the request at once if it would have to wait
    expires_s: float | None = None  # clock time at which the request is ended as expired
    cost_budget: float | None = None
    placement: dict[str, int] = {}  # node name -> the replica that route chose
    avoid: tuple[EngineReplica, ...] = ()  # replicas that failed on this request
    num_cached_tokens: int = 0  # prompt tokens that the router believes to be cached
    emitted_token_ids: tuple[int, ...] = ()
    emitted_text: str = ""
    num_emitted_without_ids: int = 0
    stamps: Stamps = Stamps()
    tags: dict[str, str] = {}
    texts: tuple[tuple[int, ...], ...] = ()
    dimensions: int | None = None

    @property
    def key(self) -> ChoiceKey:
        return self.request_id, self.choice

    @property
    def num_emitted(self) -> int:
        """Tokens of the answer that were emitted before; above 0, the request resumes."""
        return len(self.emitted_token_ids) + self.num_emitted_without_ids

    @property
    def is_impatient(self) -> bool:
        """Whether the request ends where it would have to wait: it asked not to wait, and does not
        resume.
        """
        return self.no_queue and not self.epoch and not self.num_emitted

    @property
    def num_uncached_tokens(self) -> int:
        """Tokens that a prefill has to compute."""
        known = len(self.prompt_token_ids) + len(self.emitted_token_ids)
        return known - self.num_cached_tokens

    def sequence(
        self, owner: str, *, hold_kv: bool = False, lease: "LeaseRef | None" = None
    ) -> "SequenceState":
        """The sequence state that the operator `owner` submits to an engine."""
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
            user_id=self.user_id,
            salt=self.salt,
            hold_kv=hold_kv,
            lease=lease,
            priority=self.priority,
            expires_s=self.expires_s,
            dimensions=self.dimensions,
        )


class SequenceState(msgspec.Struct, frozen=True, kw_only=True, tag="sequence"):
    """All that an engine needs to start or resume one sequence. Versioned, as it crosses processes.

    Fields with the names of `Request` mean the same. The engine gives the events to the operator
    `owner`. `hold_kv`: stop after the first token and keep the lease for an export. `lease`: blocks
    in the engine's own pool that already hold the KV of the prompt.
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
    sampling: Sampling = Sampling()  # the session has set a seed
    user_id: str = ""
    salt: str = ""
    adapter: str | None = None
    task: Literal["generate", "embed"] = "generate"
    hold_kv: bool = False
    lease: "LeaseRef | None" = None
    priority: int = NORMAL
    expires_s: float | None = None
    dimensions: int | None = None

    @property
    def key(self) -> ChoiceKey:
        return self.request_id, self.choice

    @property
    def num_emitted(self) -> int:
        """The position of the next token."""
        return len(self.emitted_token_ids) + self.num_emitted_without_ids


class LeaseRef(msgspec.Struct, frozen=True, kw_only=True, tag="lease"):
    """A reference to a lease of a KV pool, for use outside that pool.

    The pool refuses the reference if (request_id, choice, epoch) is not that of the lease.
    """

    engine: str
    replica: int
    lease_id: int
    request_id: str
    choice: int
    epoch: int
    num_tokens: int  # tokens whose KV the blocks hold or will hold


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """The log probability of a token, and the most likely tokens at its position, best first.

    `top`: (token id, log probability) of each.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None  # 1: the most likely; None for sampled tokens


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, tag="tokens", gc=False):
    """New tokens of one choice, or the end of the choice, or both.

    `position`: the index in the answer of the first token. Only the last event of a choice has a
    `finish_reason`. `text`: the output text that these tokens complete; `text` may be empty, and
    never ends inside a character. `num_tokens_without_ids`: the number of tokens from an engine
    that gives text without token ids.
    """

    request_id: str
    choice: int = 0
    epoch: int = 0
    position: int = 0
    token_ids: tuple[int, ...] = ()
    num_tokens_without_ids: int = 0
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # one for each prompt token after the first
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token id that matched
    error: str | None = None  # why the choice was refused or failed; safe to show
    code: str = ""  # a key of CODES, or empty
    retry_after_s: float | None = None  # wait before a refused request is tried again
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0  # how often the engine of this event preempted the sequence
    stamps: Stamps = Stamps()
    vector: bytes = b""  # of a text that was embedded: float32, little-endian

    @property
    def key(self) -> ChoiceKey:
        return self.request_id, self.choice

    @property
    def num_tokens(self) -> int:
        """Tokens of the event, with and without ids."""
        return len(self.token_ids) + self.num_tokens_without_ids

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None


class Prefilled(msgspec.Struct, frozen=True, kw_only=True, tag="prefilled"):
    """A request after prefill: its first token, and the leases of its KV blocks.

    `lease`: the filled lease in the prefill pool; None after the transfer, or if the first token
    was the last. `reservation`: the lease in the decode pool that receives the blocks.
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
    def key(self) -> ChoiceKey:
        return self.request.key


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag="answer"):
    """The whole answer of one choice.

    `value` is what a user's function returned for the answer, if a function did.
    """

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
    vector: bytes = b""
    value: object = None

    @property
    def key(self) -> ChoiceKey:
        return self.request_id, self.choice

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer, with and without ids."""
        return len(self.token_ids) + self.num_tokens_without_ids

    @property
    def is_last(self) -> bool:
        return True


class Forked(msgspec.Struct, frozen=True, kw_only=True, tag="forked"):
    """The announcement to the session that a request became the choices 0 ... num_choices - 1."""

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
    """The last event of a request that ends before an engine has taken it."""
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
