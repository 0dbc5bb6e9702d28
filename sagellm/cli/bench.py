"""`sagellm bench`: puts load on any server, and runs the benchmarks of the repository."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import trio
from cyclopts import Parameter
from rich.console import Console

import sagellm
from sagellm.cli.bench_options import (
    CONCURRENCY,
    ResultOptions,
    ScheduleOptions,
    WorkloadOptions,
    arrivals_of,
    check_load_options,
    is_open,
    length_options,
    load_settings,
    prompts_of,
    target_of,
    warmup_of,
)
from sagellm.cli.complete import ServerOptions, translate_client_errors
from sagellm.cli.errors import FAILED, INTERRUPTED, Failure, drain_on_interrupt
from sagellm.cli.plotting import plotter, request_progress
from sagellm.client.http_calls import configured_key, configured_url
from sagellm.client.server import AsyncServerConnection, find_server_async
from sagellm.load import REFUSALS, LoadDriver, RequestRecord, Sender
from sagellm.load.report import (
    CSV_FILE,
    JSON_FILE,
    Summary,
    show_report,
    summarise,
    write_csv_file,
    write_json_file,
)

PLOT = "cdf.png"
ROOT = Path(sagellm.__file__).resolve().parent.parent
_DRAINING = "sending no more; Ctrl-C again stops at once"
Plot = Callable[..., None]


def serve(
    *,
    server: ServerOptions = ServerOptions(),  # noqa: B008 - frozen
    schedule: ScheduleOptions = ScheduleOptions(),  # noqa: B008 - frozen
    workload: WorkloadOptions = WorkloadOptions(),  # noqa: B008 - frozen
    results: ResultOptions = ResultOptions(),  # noqa: B008 - frozen
) -> int:
    """Send requests to a server, and say how it answered.

    TTFT ends with the first token. ITL is the time between events with tokens, of all requests
    together; TPOT the mean time of a request's tokens after the first token, which goodput is
    measured by. Ctrl-C once sends no more and waits, twice stops. Exit code 1 if any request
    failed.
    """
    check_load_options(schedule, workload, results)
    plot = plotter("sagellm.load.plots").plot_cdf if results.plot else None
    load = LoadRun(server, schedule, workload)
    with translate_client_errors():
        trio.run(load.run)
    if not load.records:
        raise Failure("no request was sent", "raise --duration, or --rate")
    summary = load.summarise(results)
    try:
        if results.output is not None:
            _write_results(results.output, load, summary, plot)
    finally:  # print the summary even if the disk is full
        _print_load_summary(summary, results)
    if load.is_interrupted:
        return INTERRUPTED
    return FAILED if summary.num_failed else 0


@dataclass(slots=True)
class LoadRun:
    """One load on a server. `run` sets the fields that have defaults."""

    server: ServerOptions
    schedule: ScheduleOptions
    workload: WorkloadOptions
    url: str = ""
    model: str = ""
    records: Sequence[RequestRecord] = ()
    is_interrupted: bool = False
    cpu_s: float = 0.0
    num_open_peak: int = 0

    async def run(self) -> None:
        """Warm up, then send all requests. Raises ClientError, and Failure for a failed warm-up."""
        arrivals = arrivals_of(self.schedule, self.workload)
        self.url = configured_url(self.server.url) or await find_server_async()
        client = AsyncServerConnection(
            self.url, configured_key(self.server.api_key), self.server.timeout
        )
        async with aclosing(client):
            self.model = self.server.model or await client.first_model()
            target, prompts = target_of(self.workload, self.model), prompts_of(self.workload)
            await self._warm_up(Sender(client, target, prompts))
            sender = Sender(client, target, prompts)  # its clock starts here, after the warm-up
            with request_progress(self.schedule.num_requests) as advance:
                drive = LoadDriver(sender.send, lambda: sender.now_s, report=advance)
                await self._drive(drive, arrivals)

    def summarise(self, results: ResultOptions) -> Summary:
        return summarise(
            self.records,
            cpu_s=self.cpu_s,
            num_open_peak=self.num_open_peak,
            objective=results.objective,
            is_open_loop=is_open(self.schedule),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The options of this load for the results file, without the API key."""
        return {"url": self.url, "model": self.model, **load_settings(self.schedule, self.workload)}

    async def _warm_up(self, sender: Sender) -> None:
        # Negative numbers give prompts that differ from those of the load, and warm no prefix.
        for number, arrival in enumerate(warmup_of(self.schedule, self.workload), 1):
            record = await sender.send(-number, arrival, sender.now_s)
            if not record.is_ok:
                raise _not_serving(record, self.schedule)

    async def _drive(self, drive: LoadDriver, arrivals: Iterator[Any]) -> None:
        began_s = time.process_time()
        async with drain_on_interrupt(drive.stop, _DRAINING):
            if is_open(self.schedule):
                await drive.open(arrivals)
            else:
                concurrency = self.schedule.concurrency or CONCURRENCY
                until_s = self.schedule.duration or float("inf")
                await drive.closed(arrivals, concurrency, until_s)
        self.cpu_s = time.process_time() - began_s
        self.records = sorted(drive.records, key=lambda record: record.number)
        self.is_interrupted = drive.stop.cancel_called
        self.num_open_peak = drive.num_open_peak


def _not_serving(record: RequestRecord, schedule: ScheduleOptions) -> Failure:
    cause = f"a warm-up request failed: {record.error}: {record.message}"
    return Failure(cause, _fix(record, schedule), code=FAILED)


def _fix(record: RequestRecord, schedule: ScheduleOptions) -> str:
    """The change to suggest to the user after a failed warm-up request."""
    text = (record.message or "").lower()
    if record.status in REFUSALS:
        return "wait until the server takes requests, or let --retries try again"
    if record.status == 401:
        return "give --api-key, or set SAGELLM_API_KEY"
    if record.status != 400:
        return "look at the server; a load would measure its errors"
    if record.code == "context_length_exceeded" or "context" in text:
        options = length_options(schedule)
        return f"lower {options}: prompt and answer together exceed the model's context"
    if "ignore_eos" in text:
        return "add --stop-at-eos: the server does not know ignore_eos, a field of vLLM's"
    return "change the option that the server names"


def _print_load_summary(summary: Summary, results: ResultOptions) -> None:
    if results.json:
        print(msgspec.json.encode(summary).decode())
    else:
        show_report(Console(highlight=False, soft_wrap=True), summary)


def _write_results(folder: Path, load: LoadRun, summary: Summary, plot: Plot | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json_file(folder / JSON_FILE, load.settings, summary, load.records)
    write_csv_file(folder / CSV_FILE, load.records)
    if plot is not None:
        objective = summary.goodput.objective if summary.goodput else None
        plot(folder / PLOT, load.records, objective)
    written = (JSON_FILE, CSV_FILE) if plot is None else (JSON_FILE, CSV_FILE, PLOT)
    print(f"wrote {', '.join(written)} to {folder}", file=sys.stderr)


def _measurement(name: str, module: str, does: str, *, sets_threads: bool) -> Callable[..., int]:
    """A command that runs a module of benchmarks/ in a new process. `does`: its help text."""

    def measure(*tokens: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
        return _run(module, tokens, sets_threads)

    measure.__name__ = name
    measure.__doc__ = f"""{does}

    Parameters
    ----------
    tokens
        Options of the measurement; `sagellm bench {name} -- --help` lists them.
    """
    return measure


decide = _measurement(
    "decide",
    "benchmarks.decide",
    "Measure the CPU time of deciding, a request and a token.",
    sets_threads=False,
)
engine = _measurement(
    "engine",
    "benchmarks.engine",
    """Measure the engine against transformers and this machine's limits.

    In a process of its own: the number of threads must be set before torch is loaded.""",
    sets_threads=True,
)
gateway = _measurement(
    "gateway",
    "benchmarks.gateway.measure",
    "Measure what the gateway costs a request and an event, beside the bare server.",
    sets_threads=False,
)
grammars = _measurement(
    "grammars",
    "benchmarks.grammars",
    "Measure a decode step of answers bound to a JSON schema beside one of free answers.",
    sets_threads=True,
)
overhead = _measurement(
    "overhead",
    "benchmarks.overhead",
    "Measure what a decode step costs outside its kernels, at batch 1 and 32.",
    sets_threads=True,
)
peers = _measurement(
    "peers",
    "benchmarks.peers.measure",
    """Measure the engine beside llama.cpp, ik_llama.cpp, OpenVINO, vLLM and transformers.

    Each gets an environment of its own under .venv-peers, made when it is first needed.""",
    sets_threads=True,
)
processes = _measurement(
    "processes",
    "benchmarks.processes",
    "Measure executor `processes` beside `tasks`.",
    sets_threads=False,
)
size = _measurement(
    "size",
    "benchmarks.size",
    "Measure tokens a second over batch and context: JSON, and a plot.",
    sets_threads=True,
)


def _run(module: str, tokens: Sequence[str], sets_threads: bool) -> int:
    """Run a module in a new process, and return its exit code.

    Raises Failure outside the repository.
    """
    if not (ROOT / "benchmarks" / "engine.py").is_file():
        cause = "the benchmarks are in the repository, not in the installed package"
        raise Failure(cause, "clone the repository and type `make bench` there")
    options, env = tuple(tokens), dict(os.environ)
    if sets_threads:
        chosen = _chosen_threads(tokens)
        threads = chosen or os.environ.get("OMP_NUM_THREADS") or "2"
        options = options if chosen else (*options, "--threads", threads)
        # OpenMP and MKL read these variables once, when torch is loaded.
        env |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [sys.executable, "-m", module, *options]
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


def _chosen_threads(tokens: Sequence[str]) -> str | None:
    """The value of `--threads 4` or `--threads=4`; None if the option is missing."""
    for token, following in zip(tokens, (*tokens, "")[1:], strict=True):
        name, equals, value = token.partition("=")
        if name == "--threads":
            return value if equals else following
    return None
