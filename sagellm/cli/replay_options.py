"""The options that say which requests a command takes from a trace, and how it changes them."""

from dataclasses import asdict, dataclass
from math import inf
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from sagellm.cli.errors import Failure
from sagellm.load.synthetic import PREFIX
from sagellm.load.workload import PlannedRequest, Replay, TraceError, read_workload

_COUNT, _POSITIVE = Number(gte=1), Number(gt=0, lt=1e9)
# What each option does to a trace, for the message that there is none.
_EFFECTS = {
    "speedup": "is of",
    "window": "is of",
    "every": "samples",
    "repeat": "repeats",
    "scale_input_len": "scales",
    "scale_output_len": "scales",
    "max_input_len": "clips",
    "max_output_len": "clips",
}


@Parameter(name="*", group="Trace")
@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """The changes of a trace, or of a synthetic workload."""

    speedup: Annotated[float | None, Parameter(validator=_POSITIVE)] = None
    """Replay the trace so many times as fast [default: 1]."""

    window: str | None = None
    """Only the requests of these seconds of the trace, as 600:1200, 600: or :1200."""

    every: Annotated[int | None, Parameter(validator=_COUNT)] = None
    """Only every so many-th request of the trace [default: 1]."""

    repeat: Annotated[int | None, Parameter(validator=_COUNT)] = None
    """Play the trace so many times, one after another [default: 1]."""

    scale_input_len: Annotated[float | None, Parameter(validator=_POSITIVE)] = None
    """Multiply the lengths of prompts, as 0.1; shared prefixes become shorter too [default: 1]."""

    scale_output_len: Annotated[float | None, Parameter(validator=_POSITIVE)] = None
    """Multiply the lengths of answers [default: 1]."""

    max_input_len: Annotated[int | None, Parameter(validator=_COUNT)] = None
    """Clip the prompts of the trace."""

    max_output_len: Annotated[int | None, Parameter(validator=_COUNT)] = None
    """Clip the answers of the trace."""

    @property
    def replay(self) -> Replay:
        """The changes. Raises Failure for a wrong window."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        start_s, end_s = _window(given.pop("window", ":"))
        return Replay(**given, start_s=start_s, end_s=end_s)


def check_replay(options: ReplayOptions) -> None:
    """Raise Failure for any option that is given: there is no trace."""
    for name, effect in _EFFECTS.items():
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise Failure(f"{option} {effect} a trace, and there is none", "add --trace FILE")


def read_requests(source: str, options: ReplayOptions) -> list[PlannedRequest]:
    """The requests of a trace or of a synthetic workload, changed as the options say.

    Raises Failure, and OSError for a file that cannot be read.
    """
    replay = options.replay
    try:
        found = list(replay.apply(read_workload(source)))
    except TraceError as error:
        place = "--trace" if source.startswith(PREFIX) else source
        raise Failure(str(error), error.fix, place) from None
    if not found:
        raise Failure("--window holds no request", "choose other seconds of the trace", source)
    return found


def _window(text: str) -> tuple[float, float]:
    start, colon, end = text.partition(":")
    try:
        window = float(start or 0), float(end or inf)
    except ValueError:
        window = 0.0, 0.0
    if not colon or not 0 <= window[0] < window[1]:
        raise Failure(f"--window {text} is no window", "write START:END in seconds, as 600:1200")
    return window


def replay_settings(options: ReplayOptions) -> dict[str, Any]:
    """The options by name, with defaults filled in."""
    replay, given = options.replay, asdict(options)
    return {name: getattr(replay, name, value) for name, value in given.items()}
