"""pd_split: sends long prompts to a prefill engine of their own, short ones to a joint engine."""

from dataclasses import dataclass, field

from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, Draw, Emit, Input, Setup, Step


@dataclass(frozen=True, slots=True)
class Options:
    """When prefill and decode part.

    `min_uncached_tokens`: that many prompt tokens must be computed, at least; 0 parts always.
    `min_prompt_ratio`: if given, also that many prompt tokens for each token of `max_tokens`
    (names of the published API: prefilling_threshold_input_tokens, prefilling_threshold_ratio).
    """

    min_uncached_tokens: int = field(default=32, metadata={"min": 0})
    min_prompt_ratio: float | None = field(default=None, metadata={"min": 0.0})


SPEC = OpSpec(
    "pd_split",
    (Port("in", REQUEST),),
    (Port("disaggregated", REQUEST), Port("joint", REQUEST)),
    options=Options,
    signals=frozenset(),
)


def is_disaggregated(request: Request, options: Options) -> bool:
    """llm-d's decider (disaggregate iff input - hit tokens >= threshold), and the ratio's."""
    if request.num_uncached_tokens < options.min_uncached_tokens:
        return False
    ratio = options.min_prompt_ratio
    num_prompt_tokens = len(request.prompt_token_ids)
    return ratio is None or num_prompt_tokens >= ratio * request.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class PDSplit:
    """Has no state: equal requests go equal ways."""

    options: Options

    @property
    def initial(self) -> None:
        return None

    def on(self, state: None, happened: Input, now: float, draw: Draw) -> Step[None]:
        match happened:
            case Arrival(item=Request() as request):
                apart = is_disaggregated(request, self.options)
                return Step(None, (Emit(request, "disaggregated" if apart else "joint"),))
        return Step(None)


def build(options: Options, setup: Setup) -> PDSplit:
    return PDSplit(options)
