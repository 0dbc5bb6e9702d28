"""`sagellm run`: answers one prompt, or a file of prompts, with a graph."""

import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from io import FileIO
from pathlib import Path
from typing import TypeVar

import trio

from sagellm.batch import (
    BatchRun,
    OutputFile,
    answer_record,
    encode_record,
    error_record,
    open_output,
)
from sagellm.batch.prompt_lines import LinePrompt, LineRequest, numbered_lines
from sagellm.cli.errors import (
    CONFIGURATION,
    FAILED,
    INTERRUPTED,
    Failure,
    drain_on_interrupt,
)
from sagellm.cli.grammar_options import GrammarOptions
from sagellm.cli.graph_argument import (
    Assignments,
    Imports,
    choose_graph,
    choose_model,
    engine_failures,
    parse_assignments,
)
from sagellm.cli.run_options import (
    FileOptions,
    PromptOptions,
    RunSamplingOptions,
    check_run_options,
)
from sagellm.cli.terminal import FileProgress, print_summary, show_start_progress, show_summary
from sagellm.runtime.messages import SERVED, Answer
from sagellm.runtime.models.chat import ChatTemplateError
from sagellm.runtime.sampling import Sampling
from sagellm.session import Output, RequestError, RequestFailed, RequestRefused, Session
from sagellm.session.requests import Encoded, check_room

STDIN, STDOUT = 0, 1
PROMPT_ID = "prompt"
_DRAINING = "finishing what runs; Ctrl-C again stops at once"
_FIX_OF_FAULT = "correct what is named there; the log on stderr has the traceback of your own code"

T = TypeVar("T")


def run(
    graph: str,
    /,
    *,
    prompt_options: PromptOptions = PromptOptions(),  # noqa: B008 - frozen
    files: FileOptions = FileOptions(),  # noqa: B008 - frozen
    sampling: RunSamplingOptions = RunSamplingOptions(),  # noqa: B008 - frozen
    grammar: GrammarOptions = GrammarOptions(),  # noqa: B008 - frozen
    model: str | None = None,
    executor: str | None = None,
    set_: Assignments = (),
    import_: Imports = (),
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
    decisions
        A file for a log of what is decided, which `sagellm replay` reads; it holds the prompts.
    json
        Print the answer, or the summary of a file, as JSON.
    """
    check_run_options(prompt_options, files)
    sampling = sampling.bound_by(grammar)
    chosen, model = choose_graph(graph, model, import_)
    model, requested = choose_model(chosen, model)
    opening = chosen.open(
        set=parse_assignments(set_), model=model, executor=executor, decisions=decisions
    )
    with engine_failures(graph), show_start_progress() as progress:
        opening.report_to(progress)
        if prompt_options.prompt is None:
            return trio.run(answer_file, opening, files, sampling, json, requested)
        return trio.run(answer_prompt, opening, prompt_options, sampling, json, requested)


async def answer_prompt(
    opening: AbstractAsyncContextManager[Session],
    prompt_options: PromptOptions,
    options: RunSamplingOptions,
    json: bool,
    model: str = "",
) -> int:
    """Print the answer to stdout and a summary to stderr, and return the exit code.

    `model` selects one of several models of a graph. Raises Failure.
    """
    prompt = _prompt(prompt_options)
    answer = _stream_answer if prompt_options.stream else _whole_answer
    async with opening as session:
        with trio.CancelScope() as asking:
            async with drain_on_interrupt(asking, "cancelled"):
                end = await _as_failures(_ask(answer, session, prompt, options, json, model))
        if asking.cancelled_caught:
            return INTERRUPTED
        show_summary(session.statistics())
    _check_served(end)
    return 0


def _prompt(prompt_options: PromptOptions) -> LinePrompt:
    text = _prompt_text(prompt_options.prompt)
    if not text:
        raise Failure("the prompt is empty", 'give --prompt "Hello", or pipe text into --prompt -')
    return [{"role": "user", "content": text}] if prompt_options.chat else text


def _prompt_text(prompt: str | None) -> str:
    """The prompt of the command line, or the contents of stdin for `-`.

    Raises Failure for text that is not UTF-8: Python represents invalid UTF-8 in arguments as lone
    surrogates, which no tokenizer accepts.
    """
    try:
        raw = sys.stdin.buffer.read() if prompt == "-" else (prompt or "").encode()
        return raw.decode()
    except UnicodeError as error:
        where = "stdin" if prompt == "-" else "--prompt"
        raise Failure(f"the prompt is not UTF-8: {error}", "convert it to UTF-8", where) from None


async def _as_failures(answering: Awaitable[T]) -> T:
    """Await the answer. Raises Failure if the request is wrong, is refused, or fails."""
    try:
        return await answering
    except RequestFailed as error:
        raise Failure(str(error), _FIX_OF_FAULT, code=FAILED) from None
    except RequestRefused as error:
        raise Failure(str(error), "change the prompt, its options or the graph") from None
    except (RequestError, ChatTemplateError) as error:
        raise Failure(str(error), "change the prompt or its options") from None


async def _ask(
    answer: Callable[..., Awaitable[T]],
    session: Session,
    prompt: LinePrompt,
    options: RunSamplingOptions,
    json: bool,
    model: str,
) -> T:
    """Encode the prompt, and call `answer` with it.

    Raises RequestError if prompt and `--max-tokens` together exceed the model's context.
    """
    encoded = session.encode(prompt, model=model)
    if options.max_tokens is not None:
        check_room(len(encoded.token_ids), options.max_tokens, session.max_model_len_of(model))
    return await answer(session, encoded, options.sampling, json, model)


async def _whole_answer(
    session: Session, prompt: Encoded, sampling: Sampling, json: bool, model: str
) -> Answer:
    try:
        answer = await session.generate(prompt, sampling=sampling, model=model)
    except (RequestRefused, RequestFailed) as error:
        if json:
            line = error_record(PROMPT_ID, str(error), str(error.end.finish_reason))
            _write(encode_record(line).decode())
        raise
    if json:
        _write(encode_record(answer_record(PROMPT_ID, [answer])).decode())
    elif answer.finish_reason in SERVED:
        _write(f"{answer.text if answer.value is None else answer.value}\n")
    return answer


async def _stream_answer(
    session: Session, prompt: Encoded, sampling: Sampling, json: bool, model: str
) -> Output | None:
    """Print each event as text or as a JSON line, and return the last event, if any."""
    event: Output | None = None
    async with session.stream(prompt, sampling=sampling, model=model) as stream:
        try:
            async for event in stream:
                _write(encode_record(_as_fields(event)).decode() if json else event.text)
        except (RequestRefused, RequestFailed) as error:
            _write(encode_record(_as_fields(error.end)).decode() if json else "\n")
            raise
    _write("" if json else "\n")
    return event


def _as_fields(event: Output) -> dict[str, object]:
    names = ("text", "token_ids", "finish_reason", "error")
    return {"id": PROMPT_ID, **{name: getattr(event, name) for name in names}}


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _check_served(end: Output | None) -> None:
    """Raise Failure unless `end`, the last event of a request, ends it with an answer."""
    reason = end.finish_reason if end else "filtered"
    if reason in SERVED:
        return
    cause = (end and end.error) or f"the graph ended the request: {reason}"
    code = CONFIGURATION if reason == "refused" else FAILED
    raise Failure(cause, "change the prompt, its options or the graph", code=code)


async def answer_file(
    opening: AbstractAsyncContextManager[Session],
    files: FileOptions,
    options: RunSamplingOptions,
    json: bool,
    model: str = "",
) -> int:
    """Answer every line of the input file, and return the exit code.

    The code is FAILED if a line failed, INTERRUPTED after Ctrl-C. `model` serves the lines that
    name no model. Raises Failure.
    """
    if json and files.output is None:
        raise Failure("--json prints a summary where the answers go", "add --output FILE")
    drain = trio.CancelScope()
    _check_output(files)
    with _open_input(files.input) as source:
        async with opening as session:
            with _open_output(files) as output, FileProgress(files.input) as progress:
                batch = _batch(session, output, options, progress, model)
                async with drain_on_interrupt(drain, _DRAINING):
                    counts = await batch.serve(numbered_lines(source), drain)
            (print_summary if json else show_summary)(session.statistics(), counts)
    if drain.cancel_called:
        return INTERRUPTED
    return FAILED if counts.num_failed else 0


def _check_output(files: FileOptions) -> None:
    """Raise Failure if the output file cannot be created, is the input, or must not be changed.

    Called before a model is loaded, so that a mistake is reported at once.
    """
    if files.output is None:
        return
    if not files.output.parent.is_dir():
        cause = f"there is no folder {files.output.parent}"
        raise Failure(cause, "make it, or choose another --output", str(files.output))
    if not files.output.exists():
        return
    # Opening the output would truncate the input before it is read.
    if files.output.is_file() and os.path.samestat(
        os.stat(_source(files.input)), files.output.stat()
    ):
        raise Failure("the output is the input", "choose another --output", str(files.output))
    if not (files.force or files.resume):
        fix = "--resume keeps its answers and asks the others; --force overwrites it"
        raise Failure("the output exists", fix, str(files.output))


def _source(path: Path | None) -> int | str:
    return STDIN if str(path) == "-" else str(path)


def _open_input(path: Path | None) -> FileIO:
    source = _source(path)
    return FileIO(source, closefd=source != STDIN)  # unbuffered: see `numbered_lines`


def _open_output(files: FileOptions) -> OutputFile:
    # Called after the graph is open: a graph that cannot be opened should leave no empty file.
    if files.output is None:
        return OutputFile(open(STDOUT, "wb", closefd=False), Path("standard output"))
    return open_output(files.output, force=files.force, resume=files.resume)


def _batch(
    session: Session,
    output: OutputFile,
    options: RunSamplingOptions,
    progress: FileProgress,
    default_model: str,
) -> BatchRun:
    async def reply(ask: LineRequest) -> Sequence[Answer]:
        model = ask.fields.get("model", default_model)
        encoded = session.encode(ask.prompt, model=model)
        if ask.has_max_tokens or options.max_tokens is not None:
            num_tokens = len(encoded.token_ids)
            check_room(num_tokens, ask.sampling.max_tokens, session.max_model_len_of(model))
        fields = {**ask.fields, "model": model}
        return await session.generate_all(encoded, sampling=ask.sampling, **fields)

    return BatchRun(
        reply, output, options.sampling, frozenset(options.given), report=progress.advance
    )
