"""`sagellm chat`: a conversation on the terminal with any OpenAI-compatible server."""

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import msgspec
import trio
from cyclopts import Parameter

from sagellm.cli.chat_tools import ChatTools, load_tools
from sagellm.cli.complete import (
    RequestSamplingOptions,
    ServerOptions,
    StreamedAnswer,
    print_answer,
    print_stream,
    read_text,
    show_stats,
    translate_client_errors,
)
from sagellm.cli.errors import FAILED, INTERRUPTED, Failure, explain, show_failure
from sagellm.cli.grammar_options import GrammarOptions
from sagellm.client.http_calls import first_model_of
from sagellm.client.tool_loop import ToolLoop, ToolsUnfinished
from sagellm.graphs.vocabulary import nearest

with suppress(ImportError):  # importing readline adds line editing to `input`; optional
    import_module("readline")

PROMPT = "> "
HINT = "/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves"
SLASH = "/"
ESCAPE = "//"  # begins a text whose first character is a slash


def chat(
    *,
    server: ServerOptions = ServerOptions(),  # noqa: B008 - frozen
    sampling: RequestSamplingOptions = RequestSamplingOptions(),  # noqa: B008 - frozen
    grammar: GrammarOptions = GrammarOptions(),  # noqa: B008 - frozen
    system: str | None = None,
    tools: Path | None = None,
    yes: bool = False,
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
    tools
        A Python file, whose public functions the model may call, decorated ones too, but not those
        that the file imports. You are asked before each call.
    yes
        Make the calls of tools without asking.
    question
        Ask this alone, print the answer and leave; `-` reads it from stdin.
    stats
        Say on stderr after each answer how many tokens came, when the first, how many a second.
    json
        With --question: print one object: model, text, finish_reason, usage, timing.
    """
    if json and question is None:
        raise Failure("--json needs a question", "add --question TEXT")
    only = None if question is None else read_text(question, "--question")
    options = {**sampling.given, **grammar.fields}
    with translate_client_errors():
        offered = load_tools(tools, yes=yes)
    session = ChatSession(_resolved(server), options, offered)
    if system is not None:
        session.append("system", system)
    return _converse(session, stats) if only is None else _answer_once(session, only, stats, json)


def _resolved(server: ServerOptions) -> ServerOptions:
    """The server with URL and model filled in, so that both stay the same for the conversation."""

    async def find() -> ServerOptions:
        async with server.client() as client:
            model = server.model or first_model_of(await client.models())
            return replace(server, url=client.url, model=model)

    with translate_client_errors():
        return trio.run(find)


@dataclass
class ChatSession:
    """A conversation. `messages` keep the received part of an answer that the user stopped.

    `options`: those of each call, with names of the client.
    """

    server: ServerOptions
    options: Mapping[str, Any]
    tools: ChatTools = field(default_factory=ChatTools)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def append(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def clear(self) -> None:
        """Forget all messages except the system prompt."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    @property
    def record(self) -> dict[str, object]:
        """Model and messages as fields of a chat request, for `/save`."""
        return {"model": self.server.model, "messages": self.messages}

    def ask(self, question: str, *, silent: bool = False) -> StreamedAnswer:
        """Send a question, make the calls of tools, and print the answer while it streams.

        A question without an answer is removed from `messages`. Raises Failure.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        with translate_client_errors():
            loop = ToolLoop(asked, self.tools.functions, self.options)
            answer = self._answered(loop, silent)
        if answer.is_stopped and answer.text:
            loop.messages.append({"role": "assistant", "content": answer.text})
        if answer.text:  # only now: the next request must not contain a failed question
            self.messages = loop.messages
        return answer

    def _answered(self, loop: ToolLoop, silent: bool) -> StreamedAnswer:
        """Ask the model until it answers. Raises ClientError, Failure."""
        while True:
            is_silent = silent or not loop.has_answer_next
            answer = trio.run(self._answer, loop, is_silent)
            if answer.reply is None:
                return answer
            try:
                for call in loop.take(answer.reply):
                    loop.add_result(call, self.tools.run(call, loop.box))
            except ToolsUnfinished as error:
                raise Failure(error.message, "ask for less at once", code=FAILED) from None
            except KeyboardInterrupt:
                print("\nstopped", file=sys.stderr)
                return StreamedAnswer(is_stopped=True)
            if loop.is_over:
                return answer

    async def _answer(self, loop: ToolLoop, silent: bool) -> StreamedAnswer:
        async with self.server.client() as client:
            asking = client.chat(loop.messages, self.server.model, stream=True, **loop.fields)
            return await print_stream(asking, silent=silent)


def _answer_once(session: ChatSession, question: str, stats: bool, json: bool) -> int:
    answer = session.ask(question, silent=json)
    if json and not answer.is_stopped:  # --json prints whole answers only
        print_answer(answer, str(session.server.model))
    if stats:
        show_stats(answer)
    return INTERRUPTED if answer.is_stopped else 0


def _converse(session: ChatSession, stats: bool) -> int:
    """Process each line until stdin ends or the user leaves. An error of a line is only shown.

    On a terminal, Ctrl-C at any moment of a line ends that line alone.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"{session.server.model} at {session.server.url}. {HINT}.", file=sys.stderr)
    while (line := _next_line(is_terminal)) is not None:
        try:
            _process(line, session, stats)
        except _EndChat:
            return 0
        except (Failure, OSError) as error:
            show_failure(explain(error) or Failure(str(error), ""))
        except (KeyboardInterrupt, BaseExceptionGroup) as error:
            # Ctrl-C before or after the stream listens for signals; a nursery puts it into a group.
            if not is_terminal or not _is_interrupt(error):
                raise
            print("\nstopped", file=sys.stderr)
    return 0


def _is_interrupt(error: BaseException) -> bool:
    known = explain(error)
    return known is not None and known.code == INTERRUPTED


def _next_line(is_terminal: bool) -> str | None:
    """The next line of stdin; None at the end. On a terminal, Ctrl-C prints a hint."""
    while True:
        try:
            return input(PROMPT if is_terminal else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print(f"\n{HINT}", file=sys.stderr)


def _process(line: str, session: ChatSession, stats: bool) -> None:
    """Run a command or ask a question. Raises _EndChat, Failure, OSError."""
    text = text_of(line)
    if text is None:
        return run_command(line, session)
    if text.strip():
        answer = session.ask(text)
        if stats:
            show_stats(answer)
    return None


def text_of(line: str) -> str | None:
    """The text of a line for the model; None if the line is a command."""
    if line.startswith(ESCAPE):
        return line.removeprefix(SLASH)
    return None if line.startswith(SLASH) else line


class _EndChat(Exception):
    """The user has ended the conversation."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a chat. `argument`: the name of its argument; empty if it takes none."""

    does: str
    run: Callable[[ChatSession, str], None]
    argument: str = ""


def run_command(line: str, session: ChatSession) -> None:
    """Run the command in `line`. Raises _EndChat, Failure, OSError."""
    word, _, argument = line.strip().partition(" ")
    command = COMMANDS.get(word)
    if command is None:
        raise _unknown(word)
    argument = argument.strip()
    if bool(argument) != bool(command.argument):
        cause = f"{word} needs a {command.argument}" if command.argument else f"{word} stands alone"
        raise Failure(cause, f"type {_usage(word, command)}")
    command.run(session, argument)


def _unknown(word: str) -> Failure:
    close = nearest(word, COMMANDS)
    fix = f"did you mean {close}?" if close else f"the commands are {', '.join(COMMANDS)}."
    escape = f"To send a text that begins with {SLASH}, begin it with {ESCAPE}"
    return Failure(f"there is no command {word}", f"{fix} {escape}")


def _usage(word: str, command: Command) -> str:
    return f"{word} {command.argument}".strip()


def _help(session: ChatSession, argument: str) -> None:
    lines = {_usage(word, command): command.does for word, command in COMMANDS.items()}
    lines[f"{ESCAPE}TEXT"] = "send /TEXT to the model"
    for usage, does in lines.items():
        print(f"  {usage:<12}{does}", file=sys.stderr)


def _clear(session: ChatSession, argument: str) -> None:
    session.clear()
    print("a new conversation", file=sys.stderr)


def _save(session: ChatSession, argument: str) -> None:
    """Write the conversation to a new file. Raises FileExistsError if the file exists."""
    path = Path(argument).expanduser()
    content = msgspec.json.format(msgspec.json.encode(session.record), indent=2)
    with path.open("xb") as file:
        file.write(content + b"\n")
    print(f"saved to {path}", file=sys.stderr)


def _tools(session: ChatSession, argument: str) -> None:
    lines = session.tools.descriptions or {"none": "start with --tools FILE to offer some"}
    for name, description in lines.items():
        print(f"  {name:<20} {description}", file=sys.stderr)


def _exit(session: ChatSession, argument: str) -> None:
    raise _EndChat


COMMANDS: dict[str, Command] = {
    "/help": Command("show this list", _help),
    "/clear": Command("begin a new conversation; the system prompt stays", _clear),
    "/tools": Command("list the tools that the model may call", _tools),
    "/save": Command("write the conversation to a new file, as JSON", _save, "FILE"),
    "/exit": Command("leave", _exit),
}
