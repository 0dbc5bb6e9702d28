"""The options of `policy_sort`, some of which only certain policies use."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sagellm.runtime.messages import Request

USUAL_SPEED = 1000.0  # tokens of prompts a second, before anything is known


@dataclass(frozen=True, slots=True)
class Options:
    """Which order, and how far past its head to look.

    `policy`: a file of that name beside this one, or one that a user registered; `own` is the order
    of `function`: request -> rank, lowest first, fixed while the request waits. `window`:
    candidates offered, so that a head which finds no credit (its engine is full) does not hold up
    those behind it that could run elsewhere.

    `policy_options`: of a policy that has some of its own.

    The others serve the policies whose docstrings name them. `aging_s`: seconds of waiting that
    outweigh one level of priority. `prefill_tokens_per_s`: how fast one engine computes prompts;
    None: as first tokens show, and 1000 before they do. `busy_queued`, `overloaded_queued`:
    requests waiting from which on the system counts as such.
    """

    policy: str = field(default="fifo", metadata={"names": "policies"})
    window: int = field(default=8, metadata={"min": 1})
    function: str | None = None
    aging_s: float = field(default=10.0, metadata={"min": 0.0})
    prefill_tokens_per_s: float | None = field(default=None, metadata={"min": 1e-3})
    busy_queued: int = field(default=16, metadata={"min": 1})
    overloaded_queued: int = field(default=128, metadata={"min": 2})
    policy_options: Mapping[str, Any] = field(default_factory=dict)

    def prefill_s(self, request: Request) -> float:
        """T_prefill: the estimated seconds of prefill that the request still needs."""
        return max(request.num_uncached_tokens, 1) / (self.prefill_tokens_per_s or USUAL_SPEED)
