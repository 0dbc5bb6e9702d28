"""A waiting critical request takes the place of background work, in simulated time."""

from dataclasses import dataclass, replace

import pytest
from msgspec.structs import replace as with_fields
from simulated_graphs import JOINT, OPTIONS, PD, Planned, Simulation, random_workload, request_of

from sagellm.runtime.core.core import Core
from sagellm.runtime.core.decision_log import encode_effects
from sagellm.runtime.core.effects import Preempt
from sagellm.runtime.messages import PRIORITIES

