"""The cost of a step with coefficients that were fitted to measured steps."""

from dataclasses import dataclass

import msgspec

from sagellm.runtime.engine.costs.piecewise import PiecewiseLinear
from sagellm.runtime.engine.step_cost import StepShape


class FittedForm(msgspec.Struct, frozen=True, tag_field="form", tag="fitted"):
    """The coefficients of a fitted cost, in seconds.

    `step_s`: of each step. `tokens`, `token_seconds`: points of a function of the step's tokens.
    `prefill_pair_s`: of a pair of a prefill token and a token that it attends to.
    `decode_context_s`: of a token in the context of a decode. `row_s`: of a sequence.
    `prefill_row_s`: what a sequence costs more that computes prefill tokens.
    """

    step_s: float
    tokens: tuple[float, ...]
    token_seconds: tuple[float, ...]
    prefill_pair_s: float
    decode_context_s: float
    row_s: float
    prefill_row_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FittedCost:
    """Implements CostModel: a fixed cost, a piecewise linear function of the step's tokens, and a
    cost for each pair, context token and sequence.
    """

    form: FittedForm
    of_tokens: PiecewiseLinear

    @classmethod
    def of(cls, form: FittedForm) -> "FittedCost":
        """Raises ValueError for points that do not increase."""
        return cls(form, PiecewiseLinear(form.tokens, form.token_seconds))

    def seconds(self, shape: StepShape) -> float:
        """The duration of a step, in seconds."""
        return (
            self.form.step_s
            + self.of_tokens(shape.num_tokens)
            + shape.num_prefill_pairs * self.form.prefill_pair_s
            + shape.num_decode_context_tokens * self.form.decode_context_s
            + shape.num_rows * self.form.row_s
            + shape.num_prefill_rows * self.form.prefill_row_s
        )

    def run_seconds(self, first: StepShape, num_steps: int) -> float:
        """See CostModel."""
        num_grown = first.num_decode_rows * (num_steps * (num_steps - 1) // 2)
        return num_steps * self.seconds(first) + num_grown * self.form.decode_context_s
