"""The options of `policy_sort`, some of which only certain policies use."""

from dataclasses import dataclass, field

from sagellm.runtime.messages import Request


@dataclass(frozen=True, slots=True)
class Options:
    """Which order, and how far past its head to look.

    `policy`: a file of that name beside this one, or one that a user registered; `own` is the order
    of `function`: request -> rank, lowest first, fixed while the request waits. `window`:
    candidates offered, so that a head which finds no credit (its engine is full) does not hold up
    those behind it that could run elsewhere.

    The others serve the policies whose docstrings name them. `aging_s`: seconds of waiting that
    outweigh one level of priority. `prefill_tokens_per_s`: how fast one engine computes prompts.
    `busy_queued`, `overloaded_queued`: requests waiting from which on the system counts as such.
    """

    policy: str = field(default="fifo", metadata={"names": "policies"})
    window: int = field(default=8, metadata={"min": 1})
    function: str | None = None
    aging_s: float = field(default=10.0, metadata={"min": 0.0})
    prefill_tokens_per_s: float = field(default=1000.0, metadata={"min": 1e-3})
    busy_queued: int = field(default=16, metadata={"min": 1})
    overloaded_queued: int = field(default=128, metadata={"min": 2})

    def prefill_s(self, request: Request) -> float:
        """T_prefill: the estimated seconds of prefill that the request still needs."""
        return max(request.num_uncached_tokens, 1) / self.prefill_tokens_per_s
