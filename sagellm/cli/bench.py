"""`sagellm bench`: load on any server, and the measurements of the repository."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import msgspec
import trio
from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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
from sagellm.cli.errors import FAILED, INTERRUPTED, RESOURCES, Failure, drain_on_interrupt
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

ROOT = Path(sagellm.__file__).resolve().parent.parent


def decide(*tokens: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Measure the CPU time of deciding, a request and a token.

    Parameters
    ----------
    tokens
        Options of the measurement; `sagellm bench decide -- --help` lists them.
    """
    return _plainly("benchmarks.decide", tokens)


def engine(*tokens: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Measure the engine against transformers and this machine's limits.

    In a process of its own: the number of threads must be set before torch is loaded.

    Parameters
    ----------
    tokens
        Options of the measurement; `sagellm bench engine -- --help` lists them.
    """
    return _with_threads("benchmarks.engine", tokens)


def peers(*tokens: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Measure the engine beside llama.cpp, OpenVINO, vLLM and transformers.

    Each gets an environment of its own under .venv-peers, made when it is first needed.

    Parameters
    ----------
    tokens
        Options of the measurement; `sagellm bench peers -- --help` lists them.
    """
    return _with_threads("benchmarks.peers.measure", tokens)


def processes(*tokens: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Measure executor `processes` beside `tasks`.

    Parameters
    ----------
    tokens
        Options of the measurement; `sagellm bench processes -- --help` lists them.
    """
    return _plainly("benchmarks.processes", tokens)


def size(*tokens: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Measure tokens a second over batch and context: JSON, and a plot.

    Parameters
    ----------
    tokens
        Options of the measurement; `sagellm bench size -- --help` lists them.
    """
    return _with_threads("benchmarks.size", tokens)


def gateway(*tokens: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Measure what the gateway costs a request and an event, beside the bare server.

    Parameters
    ----------
    tokens
        Options of the measurement; `sagellm bench gateway -- --help` lists them.
    """
    return _plainly("benchmarks.gateway.measure", tokens)


def _plainly(module: str, tokens: Sequence[str]) -> int:
    _check_repository()
    command = [sys.executable, "-m", module, *tokens]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def _with_threads(module: str, tokens: Sequence[str]) -> int:
    """Run it in a process whose libraries know the number of threads from the start."""
    _check_repository()
    chosen = _chosen_threads(tokens)
    threads = chosen or os.environ.get("OMP_NUM_THREADS") or "2"
    options = tokens if chosen else (*tokens, "--threads", threads)
    command = [sys.executable, "-m", module, *options]
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


def _check_repository() -> None:
    if not (ROOT / "benchmarks" / "engine.py").is_file():
        cause = "the benchmarks are in the repository, not in the installed package"
        raise Failure(cause, "clone the repository and type `make bench` there")


def _chosen_threads(tokens: Sequence[str]) -> str | None:
    """What `--threads 4` or `--threads=4` says."""
    for token, following in zip(tokens, (*tokens, "")[1:], strict=True):
        name, equals, value = token.partition("=")
        if name == "--threads":
            return value if equals else following
    return None


PLOT = "cdf.png"
DRAINING = "sending no more; Ctrl-C again stops at once"
Plot = Callable[..., None]


def serve(
    *,
    server: ServerOptions = ServerOptions(),  # noqa: B008 - frozen
    when: ScheduleOptions = ScheduleOptions(),  # noqa: B008 - frozen
    what: WorkloadOptions = WorkloadOptions(),  # noqa: B008 - frozen
    results: ResultOptions = ResultOptions(),  # noqa: B008 - frozen
) -> int:
    """Send requests to a server, and say how it answered.

    TTFT ends with the first token. ITL is the time between events with tokens, of all requests
    together; TPOT the mean time of a request's tokens behind the first, which goodput is measured
    by. Ctrl-C once sends no more and waits, twice stops. Exit code 1 if any request failed.
    """
    check_load_options(when, what, results)
    plot = _plotter() if results.plot else None
    load = LoadRun(server, when, what)
    with translate_client_errors():
        trio.run(load.run)
    if not load.records:
        raise Failure("no request was sent", "raise --duration, or --rate")
    summary = load.summarise(results)
    try:
        if results.output is not None:
            _write_results(results.output, load, summary, plot)
    finally:  # neither a full disk nor a reader of stdout that has left costs both
        _print_load_summary(summary, results)
    if load.is_interrupted:
        return INTERRUPTED
    return FAILED if summary.num_failed else 0


@dataclass(slots=True)
class LoadRun:
    """One load: what was asked for, and then what came of it."""

    server: ServerOptions
    when: ScheduleOptions
    what: WorkloadOptions
    url: str = ""
    model: str = ""
    records: Sequence[RequestRecord] = ()
    is_interrupted: bool = False
    cpu_s: float = 0.0
    num_open_peak: int = 0

    async def run(self) -> None:
        """Warm up, then send all. Raises ClientError or Failure where the server does not serve."""
        arrivals = arrivals_of(self.when, self.what)
        self.url = configured_url(self.server.url) or await find_server_async()
        client = AsyncServerConnection(
            self.url, configured_key(self.server.api_key), self.server.timeout
        )
        async with aclosing(client):
            self.model = self.server.model or await client.first_model()
            target, prompts = target_of(self.what, self.model), prompts_of(self.what)
            await self._warm_up(Sender(client, target, prompts))
            sender = Sender(client, target, prompts)
            with _progress(self.when) as advance:
                drive = LoadDriver(sender.send, lambda: sender.now_s, report=advance)
                await self._drive(drive, arrivals)

    def summarise(self, results: ResultOptions) -> Summary:
        return summarise(
            self.records,
            cpu_s=self.cpu_s,
            num_open_peak=self.num_open_peak,
            objective=results.objective,
            is_open_loop=is_open(self.when),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What it was, without the key."""
        return {"url": self.url, "model": self.model, **load_settings(self.when, self.what)}

    async def _warm_up(self, sender: Sender) -> None:
        for number, arrival in enumerate(warmup_of(self.when, self.what), 1):
            record = await sender.send(-number, arrival, sender.now_s)
            if not record.is_ok:
                raise _not_serving(record, self.when)

    async def _drive(self, drive: LoadDriver, arrivals: Iterator[Any]) -> None:
        began_s = time.process_time()
        async with drain_on_interrupt(drive.stop, DRAINING):
            if is_open(self.when):
                await drive.open(arrivals)
            else:
                concurrency = self.when.concurrency or CONCURRENCY
                until_s = self.when.duration or float("inf")
                await drive.closed(arrivals, concurrency, until_s)
        self.cpu_s = time.process_time() - began_s
        self.records = sorted(drive.records, key=lambda record: record.number)
        self.is_interrupted = drive.stop.cancel_called
        self.num_open_peak = drive.num_open_peak


def _not_serving(record: RequestRecord, when: ScheduleOptions) -> Failure:
    cause = f"a warm-up request failed: {record.error}: {record.message}"
    return Failure(cause, _fix(record, when), code=FAILED)


def _fix(record: RequestRecord, when: ScheduleOptions) -> str:
    """What to change, by what the server says of a warm-up request."""
    said = (record.message or "").lower()
    if record.status in REFUSALS:
        return "wait until the server takes requests, or let --retries try again"
    if record.status == 401:
        return "give --api-key, or set SAGELLM_API_KEY"
    if record.status != 400:
        return "look at the server; a load would measure its errors"
    if record.code == "context_length_exceeded" or "context" in said:
        return (
            f"lower {length_options(when)}: prompt and answer together exceed the model's context"
        )
    if "ignore_eos" in said:
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


def _plotter() -> Plot:
    """Raises Failure where matplotlib is not installed, before anything is sent."""
    try:
        plot: Plot = import_module("sagellm.load.plots").plot_cdf
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        cause = "--plot needs matplotlib, which is not installed"
        fix = f"{sys.executable} -m pip install matplotlib, or leave --plot out"
        raise Failure(cause, fix, code=RESOURCES) from None
    return plot


@contextmanager
def _progress(when: ScheduleOptions) -> Iterator[Callable[[RequestRecord], None]]:
    """A bar on stderr where that is a terminal; gives what is called for each request."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("requests", total=when.num_requests)
        yield lambda record: bar.advance(task)
