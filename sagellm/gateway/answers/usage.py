"""How many tokens a call has cost so far."""

from sagellm.gateway.answers.structs import (
    CompletionTokensDetails,
    PromptTokensDetails,
    Usage,
)
from sagellm.runtime.messages import TokenEvent

_NO_REASONING = CompletionTokensDetails()


class Tally:
    """Counts of all prompts and choices of one call, as their events come."""

    def __init__(self) -> None:
        self._num_prompt: dict[int, int] = {}  # tokens of each prompt
        self._num_cached: dict[int, int] = {}
        self._num_completion = 0
        self.first_s: float | None = None  # when its first batch came, on the loop's clock

    def count(self, prompt: int, event: TokenEvent) -> None:
        """A prompt counts once; what of it was cached says its first choice: the others find what
        that one has left.
        """
        self._num_completion += event.num_tokens
        if event.num_prompt_tokens > self._num_prompt.get(prompt, 0):
            self._num_prompt[prompt] = event.num_prompt_tokens
        if event.choice == 0 and event.num_cached_tokens > self._num_cached.get(prompt, 0):
            self._num_cached[prompt] = event.num_cached_tokens

    @property
    def usage(self) -> Usage:
        num_prompt = sum(self._num_prompt.values())
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=self._num_completion,
            total_tokens=num_prompt + self._num_completion,
            prompt_tokens_details=PromptTokensDetails(sum(self._num_cached.values())),
            completion_tokens_details=_NO_REASONING,
        )
