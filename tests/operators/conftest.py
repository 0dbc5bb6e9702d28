"""An operator without an executor: it takes inputs, gives outputs, and keeps its state between."""

from collections.abc import Callable
from typing import Any

import pytest

from sagellm.runtime.operator import Draw, Input, Logic, OperatorOutput


class Running:
    """Gives inputs to a logic operator, one after the other."""

    def __init__(self, operator: Logic[Any]) -> None:
        self.operator = operator
        self.state = operator.initial
        self.wake_at: float | None = None
        self._num_inputs = 0

    def __call__(self, happened: Input, now: float = 0.0) -> tuple[OperatorOutput, ...]:
        draw = Draw(0, "test", self._num_inputs)
        self._num_inputs += 1
        step = self.operator.on(self.state, happened, now, draw)
        self.state, outputs, self.wake_at = step.state, step.outputs, step.wake_at
        return outputs


@pytest.fixture(scope="session")
def running() -> Callable[[Logic[Any]], Running]:
    return Running
