"""ab_split: assigns requests to one of two arms by a key, to compare two policies or sub-graphs.

All requests with the same key go to the same arm, in every run and every process: the arm follows
from a hash of the key and the experiment's name. The arm is noted (the decision log and metrics
have it), and is `tags["arm"]` of the request for later operators. `sagellm ab` compares the arms.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.runtime.messages import Request
from sagellm.runtime.notes import Assignment
from sagellm.runtime.operator import Arrival, Draw, Emit, Input, Setup, Step

A, B = "a", "b"  # the arms: a is the control


@dataclass(frozen=True, slots=True)
class ABSplitOptions:
    """`share`: the share of the keys that go to arm b.

    `key`: what the arm is chosen by. `user_id`; `tenant`: the salt of the tenant's prefix cache;
    `tag`: `tags["key"]`, which `key_by` sets, as for a session; `request_id`: each request by
    itself. A request without the key is assigned by its request id. `experiment`: another name
    assigns all keys anew.
    """

    share: float = field(default=0.5, metadata={"min": 0.0, "max": 1.0})
    key: Literal["user_id", "tenant", "tag", "request_id"] = "user_id"
    experiment: str = "ab"


SPEC = OpSpec(
    "ab_split",
    (Port("in", REQUEST),),
    (Port(A, REQUEST), Port(B, REQUEST)),
    options=ABSplitOptions,
    subscribes=frozenset(),
    signals=frozenset(),
)


class ABSplitState(msgspec.Struct, frozen=True):
    """`noted`: the assignments that the core has not taken yet."""

    noted: tuple[Assignment, ...] = ()


@dataclass(frozen=True, slots=True)
class ABSplit:
    """Emits each request at the outlet of its arm."""

    options: ABSplitOptions

    @property
    def initial(self) -> ABSplitState:
        return ABSplitState()

    def on(
        self, state: ABSplitState, happened: Input, now: float, draw: Draw
    ) -> Step[ABSplitState]:
        match happened:
            case Arrival(item=Request() as request):
                unit = unit_of(request, self.options.key)
                arm = arm_of(unit, self.options)
                note = Assignment(
                    *request.key, arm, unit, request.stamps.arrived_s, request.slo_ttft_s
                )
                tagged = msgspec.structs.replace(request, tags={**request.tags, "arm": arm})
                return Step(ABSplitState((*state.noted, note)), (Emit(tagged, arm),))
        return Step(state)


def unit_of(request: Request, key: str) -> str:
    """The unit that a request is assigned with. Units of different kinds never are equal."""
    named = {"user_id": request.user_id, "tenant": request.salt, "tag": request.tags.get("key", "")}
    value = named.get(key, "")
    return f"{key}:{value}" if value else f"request_id:{request.request_id}"


def arm_of(unit: str, options: ABSplitOptions) -> str:
    """The arm of a unit: b for the share `options.share` of all units."""
    content = f"{options.experiment}/{unit}".encode(errors="surrogatepass")
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return B if int.from_bytes(digest, "big") < options.share * 2.0**64 else A


def build(options: ABSplitOptions, setup: Setup) -> ABSplit:
    return ABSplit(options)
