"""`sagellm complete`: what follows a text, from any OpenAI-compatible server."""

import sys
from typing import Annotated

import trio
from cyclopts import Parameter

from sagellm.cli.answer import Told, print_json, show_cost, tell
from sagellm.cli.failure import INTERRUPTED, Failure
from sagellm.cli.remote import DrawOptions, ServerOptions, explained
from sagellm.client.asking import first_of


def complete(
    text: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    server: ServerOptions = ServerOptions(),  # noqa: B008 - frozen
    draw: DrawOptions = DrawOptions(),  # noqa: B008 - frozen
    stats: bool = False,
    json: bool = False,
) -> int:
    """Print what a model writes behind a text, while it comes; Ctrl-C stops it.

    Parameters
    ----------
    text
        The text; `-` reads it from stdin.
    stats
        Say on stderr how many tokens came, when the first, and how many a second.
    json
        Print one object when the answer is whole: model, text, finish_reason, usage, timing.
    """
    prompt = read_text(text, "TEXT")
    with explained():
        model, told = trio.run(_complete, prompt, server, draw, stats, json)
    if json and not told.is_stopped:
        print_json(told, model)
    if stats:
        show_cost(told)
    return INTERRUPTED if told.is_stopped else 0


async def _complete(
    prompt: str, server: ServerOptions, draw: DrawOptions, stats: bool, json: bool
) -> tuple[str, Told]:
    options = {**draw.given}
    if stats or json:
        options["stream_options"] = {"include_usage": True}
    async with server.client() as client:
        model = server.model or first_of(await client.models())
        asking = client.generate(prompt, model, stream=True, **options)
        return model, await tell(asking, silent=json)


def read_text(text: str, where: str) -> str:
    """The text itself, or stdin for `-`. Raises Failure where there is none, or no UTF-8."""
    try:
        raw = sys.stdin.buffer.read() if text == "-" else text.encode()
        read = raw.decode()
    except UnicodeError as error:
        cause = f"the text is not UTF-8: {error}"
        raise Failure(cause, "convert it to UTF-8", "stdin" if text == "-" else where) from None
    if not read:
        raise Failure("the text is empty", "give some, or pipe it in and give -", where)
    return read
