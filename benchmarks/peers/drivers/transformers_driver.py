"""transformers' `generate`, as its users call it: its default attention, greedy. Row "fp32" too."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from wire import Ask, Clock, Load, serve

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Steps(StoppingCriteria):  # type: ignore[misc]
    """Notes every step, and stops the run when it is late."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._clock.note_all()
        return torch.full((input_ids.shape[0],), self._clock.is_late)


class Transformers:
    """Runs padded batches of equal lengths."""

    _model: Any

    def load(self, asked: Load) -> None:
        torch.set_num_threads(asked.threads)
        torch.set_grad_enabled(False)
        self._model = AutoModelForCausalLM.from_pretrained(asked.path, dtype=DTYPES[asked.row])
        self._model.eval()

    def run(self, asked: Ask) -> list[list[float]]:
        token_ids = torch.tensor(asked.prompts)
        clock = Clock(asked)
        self._model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=asked.num_out,
            min_new_tokens=asked.num_out,
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
