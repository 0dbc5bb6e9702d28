"""`sagellm chat`: a conversation on the terminal with any OpenAI-compatible server."""

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
import trio
from cyclopts import Parameter

from sagellm.cli.complete import (
    RequestSamplingOptions,
    ServerOptions,
    read_text,
    translate_client_errors,
)
from sagellm.cli.errors import INTERRUPTED, Failure, explain, show_failure
from sagellm.cli.terminal import StreamedAnswer, print_answer, print_stream, show_stats
from sagellm.client.http_calls import first_model_of
from sagellm.graphs.vocabulary import nearest

SLASH = "/"
ESCAPE = "//"  # begins a text whose first character is a slash


class Conversation(Protocol):
    """What the commands need of a conversation."""

    @property
    def record(self) -> Mapping[str, object]:
        """Model and messages, as a chat request has them."""
        ...

    def clear(self) -> None:
        """Forget all messages but the system prompt."""


class Leave(Exception):
    """The user ends the conversation."""


@dataclass(frozen=True, slots=True)
class Command:
    """`argument` names what follows the word; "" where nothing may follow."""

    does: str
    run: Callable[[Conversation, str], None]
    argument: str = ""


def text_of(line: str) -> str | None:
    """What the model is sent for a line; None for a command."""
    if line.startswith(ESCAPE):
        return line.removeprefix(SLASH)
    return None if line.startswith(SLASH) else line


def execute(line: str, talk: Conversation) -> None:
    """Run the command of a line. Raises Leave, Failure, OSError."""
    word, _, argument = line.strip().partition(" ")
    command = COMMANDS.get(word)
    if command is None:
        raise _unknown(word)
    argument = argument.strip()
    if bool(argument) != bool(command.argument):
        cause = f"{word} needs a {command.argument}" if command.argument else f"{word} stands alone"
        raise Failure(cause, f"type {_usage(word, command)}")
    command.run(talk, argument)


def _unknown(word: str) -> Failure:
    close = nearest(word, COMMANDS)
    fix = f"did you mean {close}?" if close else f"the commands are {', '.join(COMMANDS)}."
    escape = f"To send a text that begins with {SLASH}, begin it with {ESCAPE}"
    return Failure(f"there is no command {word}", f"{fix} {escape}")


def _usage(word: str, command: Command) -> str:
    return f"{word} {command.argument}".strip()


def _help(talk: Conversation, argument: str) -> None:
    shown = {_usage(word, command): command.does for word, command in COMMANDS.items()}
    shown[f"{ESCAPE}TEXT"] = "send /TEXT to the model"
    for usage, does in shown.items():
        print(f"  {usage:<12}{does}", file=sys.stderr)


def _clear(talk: Conversation, argument: str) -> None:
    talk.clear()
    print("a new conversation", file=sys.stderr)


def _save(talk: Conversation, argument: str) -> None:
    """A file that exists is not overwritten."""
    path = Path(argument).expanduser()
    content = msgspec.json.format(msgspec.json.encode(talk.record), indent=2)
    with path.open("xb") as file:
        file.write(content + b"\n")
    print(f"saved to {path}", file=sys.stderr)


def _exit(talk: Conversation, argument: str) -> None:
    raise Leave


COMMANDS: dict[str, Command] = {
    "/help": Command("show this list", _help),
    "/clear": Command("begin a new conversation; the system prompt stays", _clear),
    "/save": Command("write the conversation to a new file, as JSON", _save, "FILE"),
    "/exit": Command("leave", _exit),
}


with suppress(ImportError):  # it edits lines of `input` once it is loaded; not everywhere
    import_module("readline")

PROMPT = "> "
HINT = "/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves"


def chat(
    *,
    server: ServerOptions = ServerOptions(),  # noqa: B008 - frozen
    draw: RequestSamplingOptions = RequestSamplingOptions(),  # noqa: B008 - frozen
    system: str | None = None,
    question: Annotated[
        str | None, Parameter(name=("--question", "-q"), allow_leading_hyphen=True)
    ] = None,
    stats: bool = False,
    json: bool = False,
) -> int:
    """Talk to a model. Ctrl-C stops an answer, Ctrl-D leaves, /help lists commands.

    Parameters
    ----------
    system
        What the model is told first.
    question
        Ask this alone, print the answer and leave; `-` reads it from stdin.
    stats
        Say on stderr after each answer how many tokens came, when the first, how many a second.
    json
        With --question: print one object: model, text, finish_reason, usage, timing.
    """
    if json and question is None:
        raise Failure("--json needs a question", "add --question TEXT")
    asked = None if question is None else read_text(question, "--question")
    talk = _found(Talk(server, draw, has_usage=stats or json))
    if system is not None:
        talk.say("system", system)
    return _converse(talk, stats) if asked is None else _once(talk, asked, stats, json)


@dataclass
class Talk:
    """A conversation so far; an answer that was stopped is kept as far as it came."""

    server: ServerOptions
    draw: RequestSamplingOptions
    has_usage: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def clear(self) -> None:
        self.messages = [one for one in self.messages if one["role"] == "system"]

    @property
    def record(self) -> dict[str, object]:
        return {"model": self.server.model, "messages": self.messages}

    def ask(self, question: str, *, silent: bool = False) -> StreamedAnswer:
        """The answer, printed while it comes; a question without any is forgotten.

        Raises Failure.
        """
        self.say("user", question)
        try:
            with translate_client_errors():
                told = trio.run(self._answer, silent)
        except BaseException:
            self.messages.pop()
            raise
        if told.text:
            self.say("assistant", told.text)
        else:
            self.messages.pop()
        return told

    async def _answer(self, silent: bool) -> StreamedAnswer:
        options: dict[str, Any] = {**self.draw.given}
        if self.has_usage:
            options["stream_options"] = {"include_usage": True}
        async with self.server.client() as client:
            asking = client.chat(self.messages, self.server.model, stream=True, **options)
            return await print_stream(asking, silent=silent)


def _found(talk: Talk) -> Talk:
    """With URL and model settled, so that they stay for the whole conversation."""

    async def find() -> ServerOptions:
        async with talk.server.client() as client:
            url, model = client.url, talk.server.model or first_model_of(await client.models())
            return replace(talk.server, url=url, model=model)

    with translate_client_errors():
        return replace(talk, server=trio.run(find))


def _once(talk: Talk, question: str, stats: bool, json: bool) -> int:
    told = talk.ask(question, silent=json)
    if json and not told.is_stopped:
        print_answer(told, str(talk.server.model))
    if stats:
        show_stats(told)
    return INTERRUPTED if told.is_stopped else 0


def _converse(talk: Talk, stats: bool) -> int:
    """Answer each line until stdin ends or the user leaves. A line that fails shows its error."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"{talk.server.model} at {talk.server.url}. {HINT}.", file=sys.stderr)
    while (line := _line(is_terminal)) is not None:
        try:
            _take(line, talk, stats)
        except Leave:
            return 0
        except (Failure, OSError) as error:
            show_failure(explain(error) or Failure(str(error), ""))
    return 0


def _take(line: str, talk: Talk, stats: bool) -> None:
    """Obey a command, or ask a question. Raises Leave, Failure, OSError."""
    text = text_of(line)
    if text is None:
        return execute(line, talk)
    if text.strip():
        told = talk.ask(text)
        if stats:
            show_stats(told)
    return None


def _line(is_terminal: bool) -> str | None:
    """The next line; None at the end."""
    while True:
        try:
            return input(PROMPT if is_terminal else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print(f"\n{HINT}", file=sys.stderr)
