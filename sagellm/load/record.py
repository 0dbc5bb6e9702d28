"""One request of a load: when it was to be sent, what came back and when."""

from dataclasses import dataclass, field

REFUSALS = (429, 503)


@dataclass(slots=True)
class Record:
    """Times in seconds since the load began; latencies are counted from when it was sent.

    TTFT ends with the first token, of which a role or an empty last chunk is none. `itl_s` holds
    the time between one event with tokens and the next: a server that puts several tokens into one
    event has fewer and longer ones (`tpot_s` is not touched by that). A request that was refused
    and tried again is counted from its first attempt.
    """

    number: int
    planned_s: float
    sent_s: float
    input_len: int  # as asked, in tokens or words
    output_len: int
    first_s: float | None = None
    last_s: float | None = None  # of its last token
    ended_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    num_events: int = 0  # with tokens
    num_attempts: int = 1
    num_refusals: int = 0
    prompt_tokens: int | None = None  # as the server says
    completion_tokens: int | None = None
    finish_reason: str | None = None
    status: int | None = None
    error: str | None = None  # its class: http_429, timed_out, cut_off ...
    message: str | None = None  # what the server says of it
    code: str | None = None  # the server's own word for it

    def token(self, now_s: float) -> None:
        """An event with tokens has come."""
        if self.last_s is None:
            self.first_s = now_s
        else:
            self.itl_s.append(now_s - self.last_s)
        self.last_s = now_s
        self.num_events += 1

    def last(self, now_s: float) -> None:
        """The event that only ends has come: with it its token, which has no text (an EOS)."""
        self.first_s = now_s if self.first_s is None else self.first_s
        self.last_s = now_s

    @property
    def is_ok(self) -> bool:
        return self.error is None

    @property
    def lag_s(self) -> float:
        """How late this client sent it."""
        return self.sent_s - self.planned_s

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer: as the server counted, or else one an event."""
        return self.num_events if self.completion_tokens is None else self.completion_tokens

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token behind the first; None where there is none."""
        if self.first_s is None or self.last_s is None or self.num_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_tokens - 1)
