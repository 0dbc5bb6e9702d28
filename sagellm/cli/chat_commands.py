"""The commands of a conversation: lines that begin with a slash."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from sagellm.cli.failure import Failure
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


def obey(line: str, talk: Conversation) -> None:
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
