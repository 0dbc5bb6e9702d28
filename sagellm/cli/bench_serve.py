"""`sagellm bench serve`: load on an OpenAI-compatible server."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import trio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sagellm.cli.bench_options import (
    CONCURRENCY,
    ResultOptions,
    WhatOptions,
    WhenOptions,
    arrivals_of,
    check_together,
    is_open,
    prompts_of,
    settings_of,
    shorter,
    target_of,
    warmup_of,
)
from sagellm.cli.failure import FAILED, INTERRUPTED, RESOURCES, Failure, draining
from sagellm.cli.remote import ServerOptions, explained
from sagellm.client.finding import given_key, given_url
from sagellm.client.server_async import AsyncServer, find_server
from sagellm.load.report import TABLE, WHOLE, show, write_table, write_whole
from sagellm.load.sender import REFUSALS, Drive, Record, Sender
from sagellm.load.summary import Summary, summarise

PLOT = "cdf.png"
DRAINING = "sending no more; Ctrl-C again stops at once"
Plot = Callable[..., None]


def serve(
    *,
    server: ServerOptions = ServerOptions(),  # noqa: B008 - frozen
    when: WhenOptions = WhenOptions(),  # noqa: B008 - frozen
    what: WhatOptions = WhatOptions(),  # noqa: B008 - frozen
    results: ResultOptions = ResultOptions(),  # noqa: B008 - frozen
) -> int:
    """Send requests to a server, and say how it answered.

    TTFT ends with the first token. ITL is the time between events with tokens, of all requests
    together; TPOT the mean time of a request's tokens behind the first, which goodput is measured
    by. Ctrl-C once sends no more and waits, twice stops. Exit code 1 if any request failed.
    """
    check_together(when, what, results)
    plot = _plotter() if results.plot else None
    load = Load(server, when, what)
    with explained():
        trio.run(load.run)
    if not load.records:
        raise Failure("no request was sent", "raise --duration, or --rate")
    summary = load.summarise(results)
    try:
        if results.output is not None:
            _keep(results.output, load, summary, plot)
    finally:  # neither a full disk nor a reader of stdout that has left costs both
        _say(summary, results)
    if load.is_interrupted:
        return INTERRUPTED
    return FAILED if summary.num_failed else 0


@dataclass(slots=True)
class Load:
    """One load: what was asked for, and then what came of it."""

    server: ServerOptions
    when: WhenOptions
    what: WhatOptions
    url: str = ""
    model: str = ""
    records: Sequence[Record] = ()
    is_interrupted: bool = False
    cpu_s: float = 0.0
    num_open_peak: int = 0

    async def run(self) -> None:
        """Warm up, then send all. Raises ClientError or Failure where the server does not serve."""
        arrivals = arrivals_of(self.when, self.what)
        self.url = given_url(self.server.url) or await find_server()
        client = AsyncServer(self.url, given_key(self.server.api_key), self.server.timeout)
        async with aclosing(client):
            self.model = self.server.model or await client.first_model()
            target, prompts = target_of(self.what, self.model), prompts_of(self.what)
            await self._warm_up(Sender(client, target, prompts))
            sender = Sender(client, target, prompts)
            with _progress(self.when) as advance:
                drive = Drive(sender.send, lambda: sender.now_s, report=advance)
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
        return {"url": self.url, "model": self.model, **settings_of(self.when, self.what)}

    async def _warm_up(self, sender: Sender) -> None:
        for number, arrival in enumerate(warmup_of(self.when, self.what), 1):
            record = await sender.send(-number, arrival, sender.now_s)
            if not record.is_ok:
                raise _not_serving(record, self.when)

    async def _drive(self, drive: Drive, arrivals: Iterator[Any]) -> None:
        began_s = time.process_time()
        async with draining(drive.stop, DRAINING):
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


def _not_serving(record: Record, when: WhenOptions) -> Failure:
    cause = f"a warm-up request failed: {record.error}: {record.message}"
    return Failure(cause, _fix(record, when), code=FAILED)


def _fix(record: Record, when: WhenOptions) -> str:
    """What to change, by what the server says of a warm-up request."""
    said = (record.message or "").lower()
    if record.status in REFUSALS:
        return "wait until the server takes requests, or let --retries try again"
    if record.status == 401:
        return "give --api-key, or set SAGELLM_API_KEY"
    if record.status != 400:
        return "look at the server; a load would measure its errors"
    if record.code == "context_length_exceeded" or "context" in said:
        return f"lower {shorter(when)}: prompt and answer together exceed the model's context"
    if "ignore_eos" in said:
        return "add --stop-at-eos: the server does not know ignore_eos, a field of vLLM's"
    return "change the option that the server names"


def _say(summary: Summary, results: ResultOptions) -> None:
    if results.json:
        print(msgspec.json.encode(summary).decode())
    else:
        show(Console(highlight=False, soft_wrap=True), summary)


def _keep(folder: Path, load: Load, summary: Summary, plot: Plot | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / WHOLE, load.settings, summary, load.records)
    write_table(folder / TABLE, load.records)
    if plot is not None:
        objective = summary.goodput.objective if summary.goodput else None
        plot(folder / PLOT, load.records, objective)
    written = (WHOLE, TABLE) if plot is None else (WHOLE, TABLE, PLOT)
    print(f"wrote {', '.join(written)} to {folder}", file=sys.stderr)


def _plotter() -> Plot:
    """Raises Failure where matplotlib is not installed, before anything is sent."""
    try:
        plot: Plot = import_module("sagellm.load.report").plot_cdf
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        cause = "--plot needs matplotlib, which is not installed"
        fix = f"{sys.executable} -m pip install matplotlib, or leave --plot out"
        raise Failure(cause, fix, code=RESOURCES) from None
    return plot


@contextmanager
def _progress(when: WhenOptions) -> Iterator[Callable[[Record], None]]:
    """A bar on stderr where that is a terminal; gives what is called for each request."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("requests", total=when.num_requests)
        yield lambda record: bar.advance(task)
