"""The option `preempts` of `policy_sort`: classes of priority that may take the places of others.

`preempts: {critical: low}` lets a waiting critical request preempt running requests of the classes
low and background. Requests of a class that may preempt go before all others in the queue: a place
that a victim leaves must not go to a request that could not have preempted it. Without the option
nothing is preempted, because a victim's tokens are computed twice.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sagellm.graphs.diagnostics import Diagnostic, GraphError, Path
from sagellm.graphs.rules.rule import choice
from sagellm.operators.policies.order import USUAL_SPEED, RankingPolicy
from sagellm.operators.policies.request_queue import QueueEntry, RequestQueue
from sagellm.runtime.messages import PRIORITIES, Request
from sagellm.runtime.operator import Claim

_MIN_SERVED = 8  # requests that left the queue before the next place is predicted
_SAMPLE_TOKENS = 1024  # the prompt whose predicted time gives the time of a token


@dataclass(frozen=True, slots=True)
class PreemptionClasses:
    """`victims`: for each priority whose requests may preempt others, the priority of the victims;
    requests of larger numbers are victims too.
    """

    victims: Mapping[int, int]

    @property
    def least_urgent(self) -> int:
        """The last priority whose requests may preempt others; -1 if there is none."""
        return max(self.victims, default=-1)

    def head(self, queue: RequestQueue, window: int) -> tuple[QueueEntry, ...]:
        """The requests to offer: those that may preempt others, by priority, and then the rest."""
        urgent = tuple(entry for _, entry in queue.urgent.head(window))
        if not urgent:
            return queue.entries.head(window)
        known = {entry[2] for entry in urgent}
        rest = [one for one in queue.entries.head(window) if one[2] not in known]
        return (*urgent, *rest)[:window]

    def _may_preempt(self, request: Request) -> bool:
        """Whether a request may preempt others. One that must not wait has no time for it."""
        return request.priority in self.victims and not request.is_impatient

    def claims(
        self, queue: RequestQueue, head: Sequence[QueueEntry], now: float
    ) -> tuple[Claim, ...]:
        """The claims of the offered requests."""
        gap_s, token_s = _mean_gap_s(queue, now), _token_s(queue)
        urgent = [entry[3] for entry in head if self._may_preempt(entry[3])]
        return tuple(
            Claim(request, self.victims[request.priority], gap_s * place, token_s)
            for place, request in enumerate(urgent, start=1)
        )

    def refuse_choosing(self, policy: RankingPolicy, name: str, policy_name: str) -> None:
        """Raise ValueError for a policy with a member `best`, if any class may preempt."""
        if self.victims and hasattr(policy, "best"):
            raise ValueError(
                f"{name}: policy {policy_name} chooses who goes first, and so does preempts: "
                "leave preempts out, or choose another policy"
            )


NO_CLASSES = PreemptionClasses({})


def _token_s(queue: RequestQueue) -> float:
    """The predicted time of a prompt token, from the latest first tokens if there are some."""
    predicted_s = queue.context.forecast.prefill_s(_SAMPLE_TOKENS)
    return 1 / USUAL_SPEED if predicted_s is None else predicted_s / _SAMPLE_TOKENS


def _mean_gap_s(queue: RequestQueue, now: float) -> float:
    """The mean time between two places that became free while requests waited; infinite if unknown.

    It counts the present gap, so that it grows while no place becomes free.
    """
    num_served = queue.backlog.num_served
    return queue.busy_s(now) / num_served if num_served >= _MIN_SERVED else float("inf")


def read_classes(table: Mapping[str, str], path: Path) -> PreemptionClasses:
    """The classes of the option `preempts` at `path`. A class may also preempt what a less urgent
    class may preempt. Raises GraphError.
    """
    found = [one for item in table.items() for one in _mistakes(*item, path)]
    if found:
        raise GraphError(tuple(found))
    named = {PRIORITIES[name]: PRIORITIES[victim] for name, victim in table.items()}
    least_urgent = max(named, default=-1)
    return PreemptionClasses(
        {
            priority: min(victim for other, victim in named.items() if other >= priority)
            for priority in range(least_urgent + 1)
        }
    )


def _mistakes(name: str, victim: str, path: Path) -> Iterator[Diagnostic]:
    unknown = [one for one in (name, victim) if one not in PRIORITIES]
    for one in unknown:
        message = f"no class of priority is called `{one}`"
        yield Diagnostic("bad-options", (*path, name), message, choice(one, PRIORITIES))
    if not unknown and PRIORITIES[victim] <= PRIORITIES[name]:
        message = f"`{name}` cannot preempt `{victim}`, which is not below it"
        lower = [other for other, number in PRIORITIES.items() if number > PRIORITIES[name]]
        hint = f"name one of {', '.join(lower)}" if lower else "leave it out"
        yield Diagnostic("bad-options", (*path, name), message, hint)
