"""The tools of `sagellm chat`: the functions of a Python file, and the consent to each call."""

import inspect
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import GenericAlias

from rich.console import Console

from sagellm.cli.errors import Failure, warn
from sagellm.client.python_tools import PythonTool, ToolBox, read_tool
from sagellm.client.replies import ResponseToolCall
from sagellm.extensions import ImportMistake, import_named

_SHOWN_CHARS = 400  # of a result on the terminal; the model reads all of it
_TYPE_MODULES = ("typing", "typing_extensions")  # of objects that can be called, such as NewType
_DECLINED = "Error: the user did not allow this call"


@dataclass(frozen=True, slots=True)
class ChatTools:
    """The functions that the model may call. `asks`: the user is asked before each call."""

    functions: tuple[PythonTool, ...] = ()
    asks: bool = True

    @property
    def descriptions(self) -> dict[str, str]:
        """The first line of each tool's description, by name."""
        return {tool.name: tool.description.partition("\n")[0] for tool in self.functions}

    def run(self, call: ResponseToolCall, box: ToolBox) -> str:
        """Show a call, make it if the user allows that, and return the text for the model."""
        console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        console.print(_shown(f"{call.name} {call.arguments}"), style="cyan", markup=False)
        if self.asks and not _is_allowed():
            return _DECLINED
        with redirect_stdout(sys.stderr):  # stdout has the answer alone
            text = box.run(call)
        shown = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
        console.print(f"= {_shown(shown)}", style="dim", markup=False)
        return text


def _shown(text: str) -> str:
    """The text with control characters spelt out: a call must not look like another call."""
    return "".join(each if each.isprintable() else f"\\u{ord(each):04x}" for each in text)


def _is_allowed() -> bool:
    # Not the prompt of `input`: it would go to stdout, which may be a file.
    print("run it? [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        return False


def load_tools(path: Path | None, *, yes: bool) -> ChatTools:
    """The public functions of a Python file as tools. `yes`: no call is asked for.

    Warns about objects that may be meant as tools. Raises Failure for a file without functions, and
    where nobody can be asked; ClientError for a function that is no tool.
    """
    if path is None:
        if yes:
            raise Failure("--yes allows the calls of tools", "add --tools FILE")
        return ChatTools()
    if not yes and not sys.stdin.isatty():
        fix = "add --yes, if the functions of this file may run unasked"
        raise Failure("nobody can be asked before a tool runs: stdin is no terminal", fix)
    try:
        module = import_named(str(path.expanduser().absolute()), Path())
    except ImportMistake as mistake:
        raise Failure(mistake.cause, mistake.fix, "--tools") from None
    found = tuple(
        read_tool(value, name)
        for name, value in vars(module).items()
        if not name.startswith("_") and _is_tool(name, value, module.__name__)
    )
    if not found:
        fix = "define a function with annotated parameters and a docstring"
        raise Failure(f"{path} defines no public function", fix, "--tools")
    return ChatTools(found, asks=not yes)


def _is_tool(name: str, value: object, file: str) -> bool:
    """Whether a public name of a file is a tool: a function that the file defines, decorated or
    not, a partial object, or an object that can be called, of a class of the file.

    Warns about what may be meant as a tool, but whose code is in another file.
    """
    is_type = isinstance(value, type | GenericAlias) or type(value).__module__ in _TYPE_MODULES
    if is_type or not callable(value):
        return False
    if isinstance(value, partial) or getattr(value, "__module__", file) == file:
        return True
    # A function that another one returned, such as a decorator that hides what it decorates.
    is_made = "<locals>" in str(getattr(value, "__qualname__", ""))
    if is_made or not inspect.isroutine(value):
        warn(f"{name} is no tool: its code is in another file; define a function that calls it")
    return False
