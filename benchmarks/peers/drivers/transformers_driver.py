"""transformers' `generate` with its default attention, greedy. Also takes the row "fp32"."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from wire import Ask, Clock, Load, serve

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Steps(StoppingCriteria):  # type: ignore[misc]
    """Records every step, and stops a run that takes too long."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._clock.note_all()
        return torch.full((input_ids.shape[0],), self._clock.is_late)


class Transformers:
    """Runs batches of prompts with equal lengths."""

    _model: Any

    def load(self, request: Load) -> None:
        torch.set_num_threads(request.threads)
        torch.set_grad_enabled(False)
        self._model = AutoModelForCausalLM.from_pretrained(request.path, dtype=DTYPES[request.row])
        self._model.eval()

    def run(self, request: Ask) -> list[list[float]]:
        token_ids = torch.tensor(request.prompts)
        clock = Clock(request)
        self._model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=request.num_out,
            min_new_tokens=request.num_out,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Steps(clock)]),
        )
        return clock.times

    def score(self, prompt: list[int]) -> list[float]:
        logits = self._model(torch.tensor([prompt])).logits[0, :-1].float()
        found = logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])
        return [float(logprob) for logprob in found]


if __name__ == "__main__":
    serve(Transformers())
