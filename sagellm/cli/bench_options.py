"""The options of `sagellm bench serve`, in groups, and the load that they describe."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from sagellm.cli.errors import Failure
from sagellm.cli.replay_options import ReplayOptions, check_replay, read_requests, replay_settings
from sagellm.load import LoadTarget
from sagellm.load.report import CSV_FILE, JSON_FILE, Objective
from sagellm.load.workload import (
    PlannedRequest,
    PromptKind,
    Prompts,
    closed_loop,
    poisson,
    within,
)

CONCURRENCY, NUM_REQUESTS = 8, 100  # defaults that depend on other options
INPUT_LEN, OUTPUT_LEN, VOCAB_SIZE = 128, 64, 256
_NOT_WITH_TRACE = ("input_len", "output_len", "spread")
COUNT, POSITIVE = Number(gte=1), Number(gt=0)


@Parameter(name="*", group="When")
@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """When requests are sent: at a fixed concurrency, at a rate, or at the times of a trace."""

    concurrency: Annotated[int | None, Parameter(validator=COUNT)] = None
    """Closed loop: so many requests at a time [default: 8]."""

    rate: Annotated[float | None, Parameter(validator=POSITIVE)] = None
    """Open loop: requests a second, as a Poisson process, however slow the server is."""

    trace: str | None = None
    """Open loop: a trace, or a workload as synthetic:rate=8,arrivals=gamma,cv=2,requests=500."""

    replay: ReplayOptions = field(default_factory=ReplayOptions)

    num_requests: Annotated[int | None, Parameter(validator=COUNT)] = None
    """How many requests [default: 100, or the whole trace, unless --duration is given]."""

    duration: Annotated[float | None, Parameter(validator=POSITIVE)] = None
    """Send for so many seconds; what is under way then is waited for."""

    warmup: Annotated[int, Parameter(validator=Number(gte=0))] = 1
    """Requests before, which are not counted; if one fails, nothing is measured."""


@Parameter(name="*", group="What")
@dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """The content, length and number of retries of the requests."""

    endpoint: Literal["completions", "chat"] = "completions"
    """/v1/completions or /v1/chat/completions."""

    prompts: PromptKind | None = None
    """Random token ids or words [default: ids; words for a chat, which takes no ids]."""

    vocab_size: Annotated[int | None, Parameter(validator=COUNT)] = None
    """Ids are below this [default: 256, which every model knows]."""

    input_len: Annotated[int | None, Parameter(validator=COUNT)] = None
    """Tokens (or words) of a prompt [default: 128]."""

    output_len: Annotated[int | None, Parameter(validator=COUNT)] = None
    """Tokens of an answer [default: 64]."""

    spread: Annotated[float | None, Parameter(validator=Number(gte=0, lte=1))] = None
    """Lengths are drawn from length * (1 - spread) to length * (1 + spread) [default: 0]."""

    temperature: Annotated[float, Parameter(validator=Number(gte=0))] = 0.0
    """As the OpenAI API has it."""

    stop_at_eos: bool = False
    """Let answers end before their length: `ignore_eos`, vLLM's extra field, is not sent."""

    retries: Annotated[int, Parameter(validator=Number(gte=0))] = 0
    """Try a request that was refused (429, 503) so many times again, when the server says."""

    request_timeout: Annotated[float, Parameter(validator=POSITIVE)] = 600.0
    """Give a request up after so many seconds."""

    seed: int = 0
    """Equal seeds send equal requests at equal times."""

    @property
    def kind(self) -> PromptKind:
        return self.prompts or ("words" if self.endpoint == "chat" else "ids")


@Parameter(name="*", group="Results")
@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """The objective, and the results that are printed and written."""

    slo_ttft: Annotated[float | None, Parameter(validator=POSITIVE)] = None
    """Goodput: the first token within so many seconds."""

    slo_itl: Annotated[float | None, Parameter(validator=POSITIVE)] = None
    """Goodput: a mean of so many seconds for each token behind the first."""

    output: Path | None = None
    """A folder for bench.json (settings, summary, every request) and requests.csv."""

    plot: bool = False
    """Draw cdf.png there too; needs matplotlib."""

    force: bool = False
    """Overwrite what the folder holds of an earlier run."""

    json: bool = False
    """Print the summary as JSON."""

    @property
    def objective(self) -> Objective | None:
        if self.slo_ttft is None and self.slo_itl is None:
            return None
        return Objective(self.slo_ttft, self.slo_itl)


def check_load_options(
    schedule: ScheduleOptions, workload: WorkloadOptions, results: ResultOptions
) -> None:
    """Raise Failure for options that contradict each other or would have no effect."""
    loops = [
        name for name in ("concurrency", "rate", "trace") if getattr(schedule, name) is not None
    ]
    if len(loops) > 1:
        raise Failure(f"--{loops[0]} and --{loops[1]} contradict each other", "give one of them")
    _check_trace(schedule, workload)
    if workload.endpoint == "chat" and workload.prompts == "ids":
        raise Failure("a chat takes no token ids", "leave --prompts out, or say --prompts words")
    if workload.kind == "words" and workload.vocab_size is not None:
        raise Failure("--vocab-size is of token ids, and words are asked", "leave it out")
    if results.output is None and (results.plot or results.force):
        given = "--plot" if results.plot else "--force"
        raise Failure(f"{given} needs a folder for the results", "add --output FOLDER")
    _check_free(results)


def _check_trace(schedule: ScheduleOptions, workload: WorkloadOptions) -> None:
    """Raise Failure for lengths together with a trace, and for trace options without a trace."""
    if schedule.trace is None:
        return check_replay(schedule.replay)
    for name in _NOT_WITH_TRACE:
        if getattr(workload, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise Failure(f"{option} contradicts --trace, which has lengths", "leave it out")


def _check_free(results: ResultOptions) -> None:
    if results.output is None or results.force:
        return
    for name in (JSON_FILE, CSV_FILE):
        if (results.output / name).exists():
            fix = "--force overwrites it; or choose another folder"
            raise Failure("the folder holds results", fix, str(results.output / name))


def target_of(workload: WorkloadOptions, model: str) -> LoadTarget:
    """The model and the options that all requests share."""
    options: dict[str, Any] = {"temperature": workload.temperature}
    if not workload.stop_at_eos:
        options["ignore_eos"] = True  # answers of planned length make loads comparable
    return LoadTarget(
        model=model,
        is_chat=workload.endpoint == "chat",
        options=options,
        num_retries=workload.retries,
        timeout_s=workload.request_timeout,
        seed=workload.seed,
    )


def prompts_of(workload: WorkloadOptions) -> Prompts:
    return Prompts(workload.kind, seed=workload.seed, vocab_size=workload.vocab_size or VOCAB_SIZE)


def arrivals_of(schedule: ScheduleOptions, workload: WorkloadOptions) -> Iterator[PlannedRequest]:
    """The requests of the load, in order. Raises Failure for a trace that cannot be read."""
    if schedule.trace is not None:
        arrivals = iter(read_requests(schedule.trace, schedule.replay))
    else:
        lengths = workload.input_len or INPUT_LEN, workload.output_len or OUTPUT_LEN
        arrivals = closed_loop(*lengths, workload.spread or 0.0, workload.seed)
        if schedule.rate is not None:
            arrivals = poisson(arrivals, schedule.rate, workload.seed)
    if is_open(schedule) and schedule.duration is not None:
        arrivals = within(arrivals, schedule.duration)
    return islice(arrivals, _num_requests(schedule))


def warmup_of(schedule: ScheduleOptions, workload: WorkloadOptions) -> Iterator[PlannedRequest]:
    """Warm-up requests: the lengths of the first requests of the load, without shared prefixes."""
    # No block ids: a warm-up must not put the load's prefixes into the server's cache.
    for arrival in islice(arrivals_of(schedule, workload), schedule.warmup):
        yield PlannedRequest(0.0, arrival.input_len, arrival.output_len)


def load_settings(schedule: ScheduleOptions, workload: WorkloadOptions) -> dict[str, Any]:
    """The options of a load, with defaults filled in. None for options that the load ignores."""
    settings = {**asdict(schedule), **asdict(workload), "prompts": workload.kind}
    del settings["replay"]
    if schedule.trace is None:
        settings |= asdict(schedule.replay)
    else:
        settings |= replay_settings(schedule.replay)
    settings["num_requests"] = _num_requests(schedule)
    for name, value in _defaults(schedule, workload).items():
        if settings[name] is None:
            settings[name] = value
    return settings


def _defaults(schedule: ScheduleOptions, workload: WorkloadOptions) -> dict[str, Any]:
    defaults: dict[str, Any] = {"vocab_size": VOCAB_SIZE} if workload.kind == "ids" else {}
    if schedule.trace is not None:
        return defaults
    defaults |= {"input_len": INPUT_LEN, "output_len": OUTPUT_LEN, "spread": 0.0}
    return defaults if is_open(schedule) else defaults | {"concurrency": CONCURRENCY}


def length_options(schedule: ScheduleOptions) -> str:
    """The names of the options that make requests shorter, for an error message."""
    return (
        "--input-len or --output-len"
        if schedule.trace is None
        else "--max-input-len or --max-output-len"
    )


def is_open(schedule: ScheduleOptions) -> bool:
    return schedule.rate is not None or schedule.trace is not None


def _num_requests(schedule: ScheduleOptions) -> int | None:
    if schedule.num_requests is None and schedule.duration is None and schedule.trace is None:
        return NUM_REQUESTS
    return schedule.num_requests
