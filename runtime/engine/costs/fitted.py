"""The cost of a step with coefficients that were fitted to measured steps."""

from dataclasses import dataclass

import msgspec

from sagellm.runtime.engine.costs.piecewise import PiecewiseLinear
from sagellm.runtime.engine.step_cost import StepShape


class FittedForm(msgspec.Struct, frozen=True, tag_field="form", tag="fitted"):
    """The coefficients of a fitted cost, in seconds.

    `step_s`: of each step. `tokens`, `token_seconds`: points of a function of the step's tokens.
    `prefill_pair_s`: of a pair of a prefill token and a token that it attends to.
    `contexts`, `context_seconds`: points of a function of the tokens in the contexts of all
    decodes. `row_s`: of a sequence. `prefill_step_s`: what a step with prefill tokens costs more.
    `mixed_step_s`: what a step costs more that also decodes.
    """

    step_s: float
    tokens: tuple[float, ...]
    token_seconds: tuple[float, ...]
    prefill_pair_s: float
    contexts: tuple[float, ...]
    context_seconds: tuple[float, ...]
    row_s: float
    prefill_step_s: float = 0.0
    mixed_step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FittedCost:
    """Implements CostModel: a fixed cost, functions of the step's tokens and of its context tokens,
    and a cost for each pair, sequence and kind of step.
    """

    form: FittedForm
    of_tokens: PiecewiseLinear
    of_contexts: PiecewiseLinear

    @classmethod
    def of(cls, form: FittedForm) -> "FittedCost":
        """Raises ValueError for points that do not increase."""
        contexts = PiecewiseLinear(form.contexts, form.context_seconds)
        return cls(form, PiecewiseLinear(form.tokens, form.token_seconds), contexts)

    def seconds(self, shape: StepShape) -> float:
        """The duration of a step, in seconds."""
        return self._without_contexts(shape) + self.of_contexts(shape.num_decode_context_tokens)

    def run_seconds(self, first: StepShape, num_steps: int) -> float:
        """See CostModel."""
        contexts_s = self.of_contexts.total(
            first.num_decode_context_tokens, num_steps, first.num_decode_rows
        )
        return num_steps * self._without_contexts(first) + contexts_s

    def _without_contexts(self, shape: StepShape) -> float:
        return (
            self.form.step_s
            + (self.form.prefill_step_s if shape.num_prefill_tokens else 0.0)
            + (self.form.mixed_step_s if shape.is_mixed else 0.0)
            + self.of_tokens(shape.num_tokens)
            + shape.num_prefill_pairs * self.form.prefill_pair_s
            + shape.num_rows * self.form.row_s
        )
