"""transformers' `generate` with the settings of most users: bfloat16, default attention, greedy."""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.cells import Cell, Run, whole_run


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Records the time of every step, and stops a run after `cap_s`."""

    def __init__(self, cap_s: float) -> None:
        self.started = time.perf_counter()
        self.steps: list[float] = []
        self._cap_s = cap_s

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.steps.append(time.perf_counter() - self.started)
        is_late = self.steps[-1] - self.steps[0] > self._cap_s and len(self.steps) > 2
        return torch.full((input_ids.shape[0],), is_late)


class Transformers:
    """Runs a cell with the same weights. Decoding that takes more than `cap_s` is cut short."""

    name = "transformers"

    def __init__(self, model: Path, cap_s: float) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self._cap_s = cap_s

    def run(self, cell: Cell, number: int) -> Run:
        token_ids = torch.tensor(cell.prompts(number))
        clock = Clock(self._cap_s)
        self._model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=cell.num_out,
            min_new_tokens=cell.num_out,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return whole_run(clock.steps, cell.num_out)
