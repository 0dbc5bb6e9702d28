"""Whether a worker died of a request, or of something else."""

from collections import deque
from collections.abc import Set
from typing import TypeAlias

Key: TypeAlias = tuple[str, int]  # a request's id and a choice

_MOST_DEATHS = 64  # that are remembered


class Suspects:
    """The requests that had no token yet from a worker as it died, death after death.

    A request that was in two of them is taken for the cause of the second, as `Recovery` takes it
    when it quarantines the request.
    """

    def __init__(self) -> None:
        self._deaths: deque[Set[Key]] = deque(maxlen=_MOST_DEATHS)

    def died(self, unserved: Set[Key]) -> bool:
        """A worker died with those requests in it; whether one of them is to blame."""
        is_known = any(not unserved.isdisjoint(earlier) for earlier in self._deaths)
        if unserved:
            self._deaths.append(unserved)
        return is_known
