"""The buckets of every histogram: those of vLLM for what has its names, so that its boards fit."""

TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_S = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
CHOICES = (1, 2, 5, 10, 20)
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
# Those of prometheus-fastapi-instrumentator: by handler, and of all calls together.
HANDLER_S = (0.1, 0.5, 1)
ALL_CALLS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75,
    1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60,
)  # fmt: skip
# Phases are short on small models: a millisecond and up, as SGLang's stages.
PHASE_S = tuple(round(0.001 * 1.62**power, 6) for power in range(30))
LAG_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
CALL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


def lengths(longest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 ... as far as `longest`."""
    bounds = (digit * 10**power for power in range(len(str(longest))) for digit in (1, 2, 5))
    return tuple(bound for bound in bounds if bound <= longest) or (1,)
