"""How decodes and prompts share the token budget of one step."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar


class PendingPrefill(Protocol):
    """A prompt with tokens left to compute. `rank`: (priority, arrival); the lowest goes first."""

    @property
    def rank(self) -> tuple[int, int]: ...

    @property
    def num_pending(self) -> int: ...


P = TypeVar("P", bound=PendingPrefill)


def decode_budget(budget: int, *, has_prefills: bool) -> int:
    """The most decodes of one step. With prefills, a quarter of `budget` is left for the
    prefills.
    """
    return budget - max(1, budget // 4) if has_prefills and budget > 1 else budget


def share_budget(
    prefills: Sequence[P], budget: int, chunk: Callable[[P, int], int], *, sat_out: bool
) -> tuple[list[tuple[P, int]], bool]:
    """Divide the token budget of one step among prefills. Return each prompt that gets tokens with
    its number of tokens, and whether the first in rank sits this step out.

    Half of the budget goes to the first in rank, so that no prompt starves. The rest goes to the
    shortest first, so that a short prompt does not wait for a long prompt.

    If some other prompt can be finished in this step, the first in rank sits the step out, but
    never twice in a row. The first token of the finished prompt then waits for the launched step
    and a short step, not for two full steps. `sat_out`: whether the first in rank sat out the
    previous step.

    `chunk(prompt, budget)`: the number of tokens of a prompt that a step with `budget` tokens left
    may compute.
    """
    first = min(prefills, key=lambda prefill: prefill.rank)
    others = [prefill for prefill in prefills if prefill is not first]
    others.sort(key=lambda prefill: (prefill.rank[0], prefill.num_pending))
    # Set aside before the other prompts take their shares, so that the first in rank advances.
    half = chunk(first, (budget + 1) // 2)
    rest = budget - half
    ending = [prefill for prefill in others if prefill.num_pending <= rest]
    # The first in rank does not sit out a step that can finish it.
    sits_out = bool(ending) and first.num_pending > half and not sat_out
    shares: list[tuple[P, int]] = []
    for prefill in ending if sits_out else others:
        share = chunk(prefill, rest)
        if share:
            shares.append((prefill, share))
        rest -= share
    # Tokens that the other prompts leave go to the first in rank.
    whole = 0 if sits_out else chunk(first, half + rest)
    if whole:
        shares.append((first, whole))
    return shares, sits_out
