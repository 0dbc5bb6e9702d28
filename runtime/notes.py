"""The notes of experiments: which arm a request was assigned to, and where a shadow disagrees.

The core collects the notes of the operators that take them (`runtime/core/experiments.py`).
"""

from typing import Any, TypeAlias

import msgspec

from sagellm.runtime.messages import ChoiceKey, Request
from sagellm.runtime.operator import Emit, OperatorOutput, Terminate

ACCEPTED, WAITS, SENT = "accepted", "waits", "sent"


class Assignment(msgspec.Struct, frozen=True, tag="arm", gc=False):
    """A choice of a request was assigned to an arm. `unit`: what the arm was chosen by."""

    request_id: str
    choice: int
    label: str
    unit: str
    arrived_s: float
    slo_ttft_s: float | None = None

    @property
    def key(self) -> ChoiceKey:
        return self.request_id, self.choice


class Disagreement(msgspec.Struct, frozen=True, tag="disagreement", gc=False):
    """A shadow would have decided otherwise about a choice of a request.

    `live`, `shadow`: the two decisions: "accepted" or the code of a refusal; an outlet; replicas as
    operator=number; for an order "sent", and the request that the shadow would have sent before.
    `gain_s`: the predicted TTFT of the live decision minus that of the shadow's; None: not both are
    predicted. `gain_tokens`: the cached prompt tokens that the shadow would have used in addition.
    `watched`: the choice to which the shadow's decision matters most: for an order, the request
    that it would have sent.
    """

    request_id: str
    choice: int
    live: str
    shadow: str
    label: str
    watched: ChoiceKey
    arrived_s: float  # of the watched choice
    slo_ttft_s: float | None = None  # of the watched choice
    gain_s: float | None = None
    gain_tokens: int = 0

    @property
    def key(self) -> ChoiceKey:
        return self.watched


Note: TypeAlias = Assignment | Disagreement


def disagreement(
    key: ChoiceKey, decisions: tuple[str, str], about: Any, label: str
) -> Disagreement:
    """`about`: the request to which the shadow's decision matters most."""
    slo_ttft_s, arrived_s = getattr(about, "slo_ttft_s", None), about.stamps.arrived_s
    return Disagreement(*key, *decisions, label, about.key, arrived_s, slo_ttft_s)


def decision(output: OperatorOutput, *, is_route: bool) -> str:
    """The decision of an answer, as a text."""
    if isinstance(output, Terminate):
        return output.event.code or str(output.event.finish_reason)
    if not isinstance(output, Emit):
        return WAITS
    if is_route and isinstance(output.item, Request):
        return ", ".join(f"{node}={one}" for node, one in sorted(output.item.placement.items()))
    return ACCEPTED if output.outlet == "out" else output.outlet


def label_of(live: OperatorOutput, shadow: OperatorOutput) -> str:
    """The class of a disagreement: few, for metrics."""
    if isinstance(shadow, Terminate):
        return "other reason" if isinstance(live, Terminate) else "would refuse"
    if isinstance(live, Terminate):
        return "would accept"
    return "elsewhere" if isinstance(shadow, Emit) else "would wait"
