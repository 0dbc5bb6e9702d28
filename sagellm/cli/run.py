"""`sagellm run`: one prompt, or a file of them, through a graph."""

from pathlib import Path
from typing import Annotated

import trio
from cyclopts import Parameter

from sagellm.backends import LoweringError, UnknownBackend
from sagellm.cli.failure import ENGINE_FIX, Failure
from sagellm.cli.file import answer_file
from sagellm.cli.loading import shown_start
from sagellm.cli.named import choose_graph, chosen_model
from sagellm.cli.options import (
    FileOptions,
    PromptOptions,
    SamplingOptions,
    check_together,
    settings,
)
from sagellm.cli.single import answer_prompt
from sagellm.runtime.engine.options import EngineOptionError


def run(
    graph: str,
    /,
    *,
    asked: PromptOptions = PromptOptions(),  # noqa: B008 - frozen
    files: FileOptions = FileOptions(),  # noqa: B008 - frozen
    draw: SamplingOptions = SamplingOptions(),  # noqa: B008 - frozen
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
    check_together(asked, files)
    named, model = choose_graph(graph, model, import_)
    model, asked_model = chosen_model(named, model)
    opening = named.open(set=settings(set_), model=model, executor=executor, decisions=decisions)
    try:
        with shown_start() as progress:
            opening.report_to(progress)
            if asked.prompt is None:
                return trio.run(answer_file, opening, files, draw, json, asked_model)
            return trio.run(answer_prompt, opening, asked, draw, json, asked_model)
    except (UnknownBackend, LoweringError, EngineOptionError) as error:
        raise Failure(str(error), ENGINE_FIX, graph) from None
