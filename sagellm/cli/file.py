"""A file of prompts through a graph."""

import os
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from io import FileIO
from pathlib import Path

import trio

from sagellm.batch.line import Ask
from sagellm.batch.lines import numbered_lines
from sagellm.batch.output import Output, open_output
from sagellm.batch.serve import Batch, Tally
from sagellm.cli.failure import FAILED, INTERRUPTED, Failure
from sagellm.cli.interrupt import draining
from sagellm.cli.options import FileOptions, SamplingOptions
from sagellm.cli.progress import Progress
from sagellm.cli.summary import print_summary, show_summary
from sagellm.prompts import check_room
from sagellm.runtime.messages import Answer
from sagellm.session import Session

STDIN, STDOUT = 0, 1
DRAINING = "finishing what runs; Ctrl-C again stops at once"


async def answer_file(
    opening: AbstractAsyncContextManager[Session],
    files: FileOptions,
    draw: SamplingOptions,
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
            with _output(files) as output, Progress(files.input) as progress:
                batch = _batch(session, output, draw, progress, model)
                async with draining(drain, DRAINING):
                    tally = await batch.serve(numbered_lines(source), drain)
            (print_summary if json else show_summary)(session.statistics(), tally)
    return INTERRUPTED if drain.cancel_called else _exit_code(tally)


def _exit_code(tally: Tally) -> int:
    return FAILED if tally.num_failed else 0


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


def _output(files: FileOptions) -> Output:
    """Opened once the graph is, so that a graph that cannot be leaves no empty file."""
    if files.output is None:
        return Output(open(STDOUT, "wb", closefd=False), Path("standard output"))
    return open_output(files.output, force=files.force, resume=files.resume)


def _batch(
    session: Session, output: Output, draw: SamplingOptions, progress: Progress, default: str
) -> Batch:
    """`default`: the model of lines that name none."""

    async def reply(ask: Ask) -> Sequence[Answer]:
        model = ask.fields.get("model", default)
        encoded = session.encode(ask.prompt, model=model)
        if ask.has_max_tokens or draw.max_tokens is not None:
            num_tokens = len(encoded.token_ids)
            check_room(num_tokens, ask.sampling.max_tokens, session.max_model_len_of(model))
        fields = {**ask.fields, "model": model}
        return await session.generate_all(encoded, sampling=ask.sampling, **fields)

    return Batch(reply, output, draw.sampling, frozenset(draw.given), report=progress.advance)
