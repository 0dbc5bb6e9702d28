"""`sagellm run`: one prompt, or a file of them, through a graph."""

import os
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from io import FileIO
from pathlib import Path
from typing import Annotated

import trio
from cyclopts import Parameter

from sagellm.backends import LoweringError, UnknownBackend
from sagellm.batch import BatchRun, LineCounts, OutputFile, open_output
from sagellm.batch.prompt_lines import LineRequest, numbered_lines
from sagellm.cli.errors import ENGINE_FIX, FAILED, INTERRUPTED, Failure, drain_on_interrupt
from sagellm.cli.graph_argument import choose_graph, choose_model
from sagellm.cli.run_options import (
    FileOptions,
    PromptOptions,
    RunSamplingOptions,
    check_run_options,
    parse_assignments,
)
from sagellm.cli.single import answer_prompt
from sagellm.cli.terminal import FileProgress, print_summary, show_start_progress, show_summary
from sagellm.runtime.engine.options import EngineOptionError
from sagellm.runtime.messages import Answer
from sagellm.session import Session
from sagellm.session.requests import check_room

STDIN, STDOUT = 0, 1
DRAINING = "finishing what runs; Ctrl-C again stops at once"


async def answer_file(
    opening: AbstractAsyncContextManager[Session],
    files: FileOptions,
    draw: RunSamplingOptions,
    json: bool,
    model: str = "",
) -> int:
    """Answer every line of the input; returns 1 if any of them failed."""
    if json and files.output is None:
        raise Failure("--json prints a summary where the answers go", "add --output FILE")
    drain = trio.CancelScope()
    _check_output(files)
    with _input(files.input) as source:
        async with opening as session:
            with _output(files) as output, FileProgress(files.input) as progress:
                batch = _batch(session, output, draw, progress, model)
                async with drain_on_interrupt(drain, DRAINING):
                    counts = await batch.serve(numbered_lines(source), drain)
            (print_summary if json else show_summary)(session.statistics(), counts)
    return INTERRUPTED if drain.cancel_called else _exit_code(counts)


def _exit_code(counts: LineCounts) -> int:
    return FAILED if counts.num_failed else 0


def _source(path: Path | None) -> int | str:
    return STDIN if str(path) == "-" else str(path)


def _input(path: Path | None) -> FileIO:
    source = _source(path)
    return FileIO(source, closefd=source != STDIN)


def _check_output(files: FileOptions) -> None:
    """Raise Failure if the output is the input, or exists, unasked: before a model is loaded."""
    if files.output is None:
        return
    if not files.output.parent.is_dir():
        cause = f"there is no folder {files.output.parent}"
        raise Failure(cause, "make it, or choose another --output", str(files.output))
    if not files.output.exists():
        return
    if files.output.is_file() and os.path.samestat(
        os.stat(_source(files.input)), files.output.stat()
    ):
        raise Failure("the output is the input", "choose another --output", str(files.output))
    if not (files.force or files.resume):
        fix = "--resume keeps its answers and asks the others; --force overwrites it"
        raise Failure("the output exists", fix, str(files.output))


def _output(files: FileOptions) -> OutputFile:
    """Opened once the graph is, so that a graph that cannot be leaves no empty file."""
    if files.output is None:
        return OutputFile(open(STDOUT, "wb", closefd=False), Path("standard output"))
    return open_output(files.output, force=files.force, resume=files.resume)


def _batch(
    session: Session,
    output: OutputFile,
    draw: RunSamplingOptions,
    progress: FileProgress,
    default: str,
) -> BatchRun:
    """`default`: the model of lines that name none."""

    async def reply(ask: LineRequest) -> Sequence[Answer]:
        model = ask.fields.get("model", default)
        encoded = session.encode(ask.prompt, model=model)
        if ask.has_max_tokens or draw.max_tokens is not None:
            num_tokens = len(encoded.token_ids)
            check_room(num_tokens, ask.sampling.max_tokens, session.max_model_len_of(model))
        fields = {**ask.fields, "model": model}
        return await session.generate_all(encoded, sampling=ask.sampling, **fields)

    return BatchRun(reply, output, draw.sampling, frozenset(draw.given), report=progress.advance)


def run(
    graph: str,
    /,
    *,
    asked: PromptOptions = PromptOptions(),  # noqa: B008 - frozen
    files: FileOptions = FileOptions(),  # noqa: B008 - frozen
    draw: RunSamplingOptions = RunSamplingOptions(),  # noqa: B008 - frozen
    model: str | None = None,
    executor: str | None = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set")] = (),
    import_: Annotated[tuple[str, ...], Parameter(name="--import")] = (),
    decisions: Path | None = None,
    json: bool = False,
) -> int:
    """Answer a prompt, or a file of them.

    Ctrl-C once lets what runs finish (a single prompt is cancelled), twice stops at once.

    Parameters
    ----------
    graph
        A graph file, the name of a shipped graph (pd, joint, pd_many), or a model: a built-in name,
        a folder, or a Hub id.
    model
        The model of every engine of a graph; of a graph that serves several models, the one that is
        asked.
    executor
        How the graph runs: tasks, in this process; or processes, a worker for each engine replica.
    set_
        Change an option of the graph, as op.key=value; may be repeated.
    import_
        A dotted module or a .py file of yours, which registers what the graph uses; may be
        repeated.
    decisions
        A file for a log of what is decided, which `sagellm replay` reads; it holds the prompts.
    json
        Print the answer, or the summary of a file, as JSON.
    """
    check_run_options(asked, files)
    named, model = choose_graph(graph, model, import_)
    model, asked_model = choose_model(named, model)
    opening = named.open(
        set=parse_assignments(set_), model=model, executor=executor, decisions=decisions
    )
    try:
        with show_start_progress() as progress:
            opening.report_to(progress)
            if asked.prompt is None:
                return trio.run(answer_file, opening, files, draw, json, asked_model)
            return trio.run(answer_prompt, opening, asked, draw, json, asked_model)
    except (UnknownBackend, LoweringError, EngineOptionError) as error:
        raise Failure(str(error), ENGINE_FIX, graph) from None
