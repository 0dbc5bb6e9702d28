"""key_by: calls a user's function to give each request a key. The strategy `affinity` of `route`
sends requests with the same key to the same replica.

The key is stored as text in `tags["key"]`; the user_id does not change.
"""

from dataclasses import dataclass

import msgspec

from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import (
    Arrival,
    Draw,
    Emit,
    Input,
    OperatorOutput,
    Setup,
    Step,
    Terminate,
)
from sagellm.runtime.user_function import UserFunction, failure_event, find_plain_function


@dataclass(frozen=True, slots=True)
class KeyByOptions:
    """`function`: request -> key."""

    function: str


SPEC = OpSpec(
    "key_by",
    (Port("in", REQUEST),),
    (Port("out", REQUEST),),
    options=KeyByOptions,
    signals=frozenset(),
)


@dataclass(frozen=True, slots=True)
class KeyBy:
    """Adds the key to requests. A request whose key cannot be computed ends as `failed`."""

    function: UserFunction

    @property
    def initial(self) -> None:
        return None

    def on(self, state: None, happened: Input, now: float, draw: Draw) -> Step[None]:
        match happened:
            case Arrival(item=Request() as request):
                return Step(None, (self._keyed(request, now),))
        return Step(None)

    def _keyed(self, request: Request, now: float) -> OperatorOutput:
        try:
            key = self._key(request)
        except Exception as error:
            why = self.function.explain(error)
            return Terminate(failure_event(request, why, now=now), error)
        tags = {**request.tags, "key": key}
        return Emit(msgspec.structs.replace(request, tags=tags))

    def _key(self, request: Request) -> str:
        result = self.function(request)
        if result is None:
            raise self.function.wanted(result, "a key")
        return str(result)


def build(options: KeyByOptions, setup: Setup) -> KeyBy:
    return KeyBy(find_plain_function(setup, options.function))
