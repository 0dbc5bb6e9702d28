"""How a gateway's process begins: which descriptors it is given, and what they are."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from sagellm.gateway.budgets import count_names
from sagellm.gateway.layers.auth import tenants
from sagellm.gateway.settings import Settings

_VARIABLE = "SAGELLM_GATEWAY"


@dataclass(frozen=True, slots=True)
class Start:
    """Descriptors: the link to the graph's process, the socket that is served, the table of counts;
    and which of its rows is this gateway's.
    """

    door: int
    listener: int
    tally: int
    num_rows: int
    row: int

    @property
    def env(self) -> Mapping[str, str]:
        return {_VARIABLE: msgspec.json.encode(self).decode()}

    @property
    def files(self) -> tuple[int, ...]:
        return self.door, self.listener, self.tally

    @classmethod
    def read(cls) -> "Start":
        return msgspec.json.decode(os.environ.pop(_VARIABLE), type=cls)


def tally_names(settings: Settings) -> tuple[str, ...]:
    """The columns of the table: calls under way, and what each tenant has."""
    return "calls", *(name for tenant in tenants(settings) for name in count_names(tenant))
