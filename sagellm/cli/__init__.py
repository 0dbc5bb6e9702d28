"""The command line: `sagellm run | serve | chat | complete | graph | bench | ...`."""

import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Literal

import msgspec
from cyclopts import App, Parameter

from sagellm.cli.errors import explain, show_failure
from sagellm.logs import command_logs

LISTED = ("torch", "trio", "msgspec", "safetensors", "tokenizers", "pyzmq", "starlette")


def sagellm_version() -> str:
    """The version of this package, as installed."""
    return installed("sagellm")


def versions() -> dict[str, str | None]:
    """Package name -> version, None where it is missing; no package is imported."""
    return {name: _version(name) for name in LISTED}


def _version(name: str) -> str | None:
    try:
        return installed(name)
    except PackageNotFoundError:
        return None


def version(*, json: bool = False) -> None:
    """List sagellm, Python, the platform and the packages that matter, with their versions.

    Parameters
    ----------
    json
        Print one object, name to version; null for a package that is missing.
    """
    found = {
        "sagellm": sagellm_version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **versions(),
    }
    if json:
        print(msgspec.json.encode(found).decode())
        return
    for name, number in found.items():
        print(f"{name:12} {number or 'missing'}")


HELP = """LLM serving as a dataflow: one graph from a prompt to tokens.

Exit codes: 0 done, 1 something failed, 2 your configuration, 3 resources, 130 interrupted,
143 terminated."""

APP = App(
    name="sagellm", help=HELP, version=sagellm_version, default_parameter=Parameter(negative=())
)
APP.command("sagellm.cli.run:run", name="run", help="Answer a prompt, or a file of them.")
APP.command("sagellm.cli.serve:serve", name="serve", help="Serve a graph to OpenAI clients.")
APP.command("sagellm.cli.chat:chat", name="chat", help="Talk to a model on any server.")
APP.command("sagellm.cli.complete:complete", name="complete", help="What follows a text.")
APP.command("sagellm.cli.workers:ps", name="ps", help="Who works for the graphs that run.")
APP.command("sagellm.cli.workers:restart", name="restart", help="Replace an operator's workers.")
APP.command("sagellm.cli.workers:drain", name="drain", help="Give a worker nothing new.")
APP.command("sagellm.cli.workers:scale", name="scale", help="Have more or fewer replicas.")
APP.command("sagellm.cli.replay:run", name="replay", help="Decide again what a log says.")
APP.command("sagellm.cli.keys:keys", name="keys", help="Make keys for links over a network.")
APP.command("sagellm.cli.doctor:doctor", name="doctor", help="Check this machine and set-up.")
APP.command("sagellm.cli:version", name="version", help="List installed versions.")
APP.command("sagellm.cli:completion", name="completion", help="Print a shell's script.")

GRAPH = App(name="graph", help="Check and draw graphs.")
GRAPH.command("sagellm.cli.graph:check", name="check", help="Find mistakes without running.")
GRAPH.command("sagellm.cli.graph:show", name="show", help="Print or draw a graph.")
APP.command(GRAPH)

CHAOS = App(name="chaos", help="Make things go wrong on purpose.")
CHAOS.command("sagellm.cli.chaos:run", name="run", help="Run scenarios, and check what holds.")
APP.command(CHAOS)

BENCH = App(name="bench", help="Measure.")
BENCH.command("sagellm.cli.bench:decide", name="decide", help="What a decision costs.")
BENCH.command("sagellm.cli.bench:engine", name="engine", help="The engine against transformers.")
BENCH.command(
    "sagellm.cli.bench:gateway", name="gateway", help="The gateway beside the bare server."
)
BENCH.command("sagellm.cli.bench:peers", name="peers", help="The engine beside other engines.")
BENCH.command("sagellm.cli.bench:processes", name="processes", help="What processes cost.")
BENCH.command("sagellm.cli.bench:size", name="size", help="The engine over batch and context.")
BENCH.command("sagellm.cli.bench:serve", name="serve", help="Load on any server.")
APP.command(BENCH)


def load(tokens: Sequence[str]) -> None:
    """Import the command that `tokens` name; with a mistake in them, as much as can be found."""
    with suppress(Exception):  # told by `main`
        APP.parse_commands(list(tokens))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is shown without a traceback."""
    tokens = sys.argv[1:] if argv is None else list(argv)
    try:
        with command_logs():
            code = APP(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:
        failure = explain(error)
        if failure is None:
            raise
        show_failure(failure)
        return failure.code
    return code if isinstance(code, int) else 0


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print the completion script of a shell.

    Parameters
    ----------
    shell
        bash reads it from ~/.local/share/bash-completion/completions/sagellm, zsh from _sagellm in
        a folder of fpath, fish from ~/.config/fish/completions/sagellm.fish.
    """
    print(_with_file_names(APP.generate_completion(shell=shell)))


def _with_file_names(script: str) -> str:
    """Let bash complete file names where no option or command fits: graphs and models are paths."""
    return script.replace("complete -F _sagellm", "complete -o default -F _sagellm")
