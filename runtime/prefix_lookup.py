"""How operators before a router know what of a prompt need not be computed."""

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Setup
from sagellm.runtime.prefixes import Hasher, Indexes


@dataclass(frozen=True, slots=True)
class PrefixLookup:
    """Looks prompts up in the indexes of the `engines` that requests may enter next; of those, in a
    graph of several models, the `models` of the request.

    A request counts with the most that any replica has: it is not known yet which one takes it.
    """

    hasher: Hasher
    engines: frozenset[str]
    models: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, setup: Setup, outlet: str | None = None) -> "PrefixLookup":
        """For the engines downstream of an operator, or of one outlet of it."""
        entered = (target for target in setup.targets if target.is_next and target.engine)
        engines = (one.engine for one in entered if outlet is None or outlet in one.outlets)
        return cls(setup.hasher, frozenset(engines), setup.models)

    def looked_up(self, request: Request, indexes: Indexes) -> Request:
        """The request with the number of its cached tokens; as it is, where no engine reports."""
        known = [indexes[name] for name in self._engines_of(request) if name in indexes]
        if not known:
            return request
        most = max(index.cached(request, self.hasher).most for index in known)
        if most == request.num_cached_tokens:
            return request
        return replace(request, num_cached_tokens=most)

    def _engines_of(self, request: Request) -> frozenset[str]:
        if not self.models:
            return self.engines
        served = self.models.get(request.model) or next(iter(self.models.values()))
        return self.engines.intersection(served)
