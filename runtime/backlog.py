"""What waits in a queue, as it tells those before it, and how long a newcomer would wait there."""

import math

import msgspec
from msgspec.structs import replace

_MEMORY_S = 10.0  # of busy time: what was served longer ago counts less and less
_EVIDENCE = 8  # requests that must have been served before anything is predicted
_WEIGHT = 1 / 8  # of the latest first token in their mean
_DEVIATIONS = 2.0


class Backlog(msgspec.Struct, frozen=True):
    """The value of feedback "queue". Tokens are those that a request makes its engine compute.

    `num_served`, `num_served_tokens` and `busy_s` count on from the opening of the graph: what was
    sent on, and the seconds that passed, while something waited. What is sent on as it arrives,
    to an engine that has room, is not among them: it says nothing of how fast room comes.
    """

    num_requests: int = 0
    num_tokens: int = 0  # of prompts, uncached, and max_tokens
    num_prompt_tokens: int = 0
    num_served: int = 0
    num_served_tokens: int = 0  # of prompts
    busy_s: float = 0.0


class Pace(msgspec.Struct, frozen=True):
    """How fast a queue is served, learned from its backlogs and from first tokens; a value.

    `tokens` and `seconds` fade with busy time, so that their quotient follows the load.
    """

    backlog: Backlog = Backlog()
    tokens: float = 0.0
    seconds: float = 0.0
    first_token_s: float = 0.0  # mean, from leaving the queue to the first token

    def with_backlog(self, backlog: Backlog) -> "Pace":
        seconds = backlog.busy_s - self.backlog.busy_s
        tokens = backlog.num_served_tokens - self.backlog.num_served_tokens
        faded = math.exp(-seconds / _MEMORY_S)
        return replace(
            self,
            backlog=backlog,
            tokens=self.tokens * faded + tokens,
            seconds=self.seconds * faded + seconds,
        )

    def with_first_token(self, seconds: float) -> "Pace":
        if not self.first_token_s:
            return replace(self, first_token_s=seconds)
        change = _WEIGHT * (seconds - self.first_token_s)
        return replace(self, first_token_s=self.first_token_s + change)

    @property
    def long_wait_s(self) -> float | None:
        """The wait that all but a few in a hundred stay below: departures are taken as Poisson, so
        that the time of n of them has a standard deviation of 1 / sqrt(n) of itself.
        """
        if self.wait_s is None:
            return None
        return self.wait_s * (1 + _DEVIATIONS / math.sqrt(max(self.backlog.num_requests, 1)))

    @property
    def wait_s(self) -> float | None:
        """How long what waits now takes to leave the queue; None before there is evidence."""
        if self.backlog.num_served < _EVIDENCE or not (self.tokens > 0 and self.seconds > 0):
            return None
        return self.backlog.num_prompt_tokens * self.seconds / self.tokens
