"""The command line: `sagellm run | serve | chat | complete | graph | bench | ...`."""

import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Literal

import msgspec
from cyclopts import App, Parameter

from sagellm.cli.errors import explain as failure_of
from sagellm.cli.errors import show_failure
from sagellm.logs import command_logs

HELP = """LLM serving as a dataflow: one graph from a prompt to tokens.

Exit codes: 0 done, 1 something failed, 2 your configuration, 3 resources, 130 interrupted,
143 terminated."""

# Name -> (module:function, help). A command is imported when it runs: `--help` never loads torch.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "run": ("sagellm.cli.run:run", "Answer a prompt, or a file of them."),
    "serve": ("sagellm.cli.serve:serve", "Serve a graph to OpenAI clients."),
    "chat": ("sagellm.cli.chat:chat", "Talk to a model on any server."),
    "complete": ("sagellm.cli.complete:complete", "What follows a text."),
    "ps": ("sagellm.cli.workers:ps", "Who works for the graphs that run."),
    "restart": ("sagellm.cli.workers:restart", "Replace an operator's workers."),
    "drain": ("sagellm.cli.workers:drain", "Give a worker nothing new."),
    "scale": ("sagellm.cli.workers:scale", "Have more or fewer replicas."),
    "simulate": ("sagellm.cli.simulate:run", "Run a graph in simulated time."),
    "calibrate": ("sagellm.cli.calibrate:run", "Measure a profile to simulate with."),
    "plan": ("sagellm.cli.plan:run", "The cheapest placement of a model."),
    "explain": ("sagellm.cli.explain:run", "What bounds a graph, in simulation."),
    "trace": ("sagellm.cli.trace:run", "Where the time of requests went."),
    "replay": ("sagellm.cli.replay:run", "Decide again what a log says."),
    "ab": ("sagellm.cli.ab:run", "Compare the arms of an A/B test."),
    "keys": ("sagellm.cli.keys:keys", "Make keys for links over a network."),
    "doctor": ("sagellm.cli.doctor:doctor", "Check this machine and set-up."),
    "tune": ("sagellm.cli.tune:tune", "Measure what suits this machine."),
    "version": ("sagellm.cli:version", "List installed versions."),
    "completion": ("sagellm.cli:completion", "Print a shell's script."),
}
GRAPH_COMMANDS: Mapping[str, tuple[str, str]] = {
    "check": ("sagellm.cli.graph:check", "Find mistakes without running."),
    "show": ("sagellm.cli.graph:show", "Print or draw a graph."),
}
ENGINE_COMMANDS: Mapping[str, tuple[str, str]] = {
    "list": ("sagellm.cli.engine_servers:list_", "The servers behind the graphs that run."),
    "register": ("sagellm.cli.engine_servers:register", "Add a server to an engine."),
    "remove": ("sagellm.cli.engine_servers:remove", "Let a server finish, and leave it."),
}
MODEL_COMMANDS: Mapping[str, tuple[str, str]] = {
    "list": ("sagellm.cli.model:list_", "What needs no download."),
    "download": ("sagellm.cli.model:download_", "Fetch one from the Hub, and check it."),
    "rm": ("sagellm.cli.model:rm", "Free what one takes."),
}
GATEWAY_COMMANDS: Mapping[str, tuple[str, str]] = {
    "start": ("sagellm.cli.background:start", "Start one, and wait until it is ready."),
    "stop": ("sagellm.cli.background:stop", "Let one finish, and end it."),
    "restart": ("sagellm.cli.background:restart", "Stop one, and start it as it was."),
    "status": ("sagellm.cli.background:status", "Which ones there are."),
    "logs": ("sagellm.cli.background:logs", "What one has logged."),
}
CHAOS_COMMANDS: Mapping[str, tuple[str, str]] = {
    "run": ("sagellm.cli.chaos:run", "Run scenarios, and check what holds."),
}
BENCH_COMMANDS: Mapping[str, tuple[str, str]] = {
    "decide": ("sagellm.cli.bench:decide", "What a decision costs."),
    "grammars": ("sagellm.cli.bench:grammars", "What answers bound to a grammar cost."),
    "engine": ("sagellm.cli.bench:engine", "The engine against transformers."),
    "gateway": ("sagellm.cli.bench:gateway", "The gateway beside the bare server."),
    "peers": ("sagellm.cli.bench:peers", "The engine beside other engines."),
    "overhead": ("sagellm.cli.bench:overhead", "The time of a step outside its kernels."),
    "processes": ("sagellm.cli.bench:processes", "What processes cost."),
    "size": ("sagellm.cli.bench:size", "The engine over batch and context."),
    "serve": ("sagellm.cli.bench:serve", "Load on any server."),
}


def sagellm_version() -> str:
    """The installed version of sagellm."""
    return installed("sagellm")


def _with_commands(app: App, commands: Mapping[str, tuple[str, str]]) -> App:
    for name, (function, help) in commands.items():
        app.command(function, name=name, help=help)
    return app


# `negative=()`: a flag has no form `--no-NAME` unless it declares one.
APP = _with_commands(
    App(
        name="sagellm", help=HELP, version=sagellm_version, default_parameter=Parameter(negative=())
    ),
    COMMANDS,
)
for group in (
    _with_commands(App(name="engine", help="Servers behind a graph."), ENGINE_COMMANDS),
    _with_commands(App(name="model", help="The models on this machine."), MODEL_COMMANDS),
    _with_commands(App(name="gateway", help="Serve in the background."), GATEWAY_COMMANDS),
    _with_commands(App(name="graph", help="Check and draw graphs."), GRAPH_COMMANDS),
    _with_commands(App(name="chaos", help="Make things go wrong on purpose."), CHAOS_COMMANDS),
    _with_commands(App(name="bench", help="Measure."), BENCH_COMMANDS),
):
    APP.command(group)


def load(tokens: Sequence[str]) -> None:
    """Import the module of the command that `tokens` name. Errors are ignored."""
    with suppress(Exception):  # `main` raises the same error again, and shows it
        APP.parse_commands(list(tokens))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return the exit code. A user's mistake is shown without a traceback."""
    tokens = sys.argv[1:] if argv is None else list(argv)
    try:
        with command_logs():
            code = APP(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:
        failure = failure_of(error)  # `explain` is a command, too
        if failure is None:
            raise
        show_failure(failure)
        return failure.code
    return code if isinstance(code, int) else 0


LISTED = ("torch", "trio", "msgspec", "safetensors", "tokenizers", "pyzmq", "starlette")


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
        **{name: _version(name) for name in LISTED},
    }
    if json:
        print(msgspec.json.encode(found).decode())
        return
    for name, number in found.items():
        print(f"{name:12} {number or 'missing'}")


def _version(name: str) -> str | None:
    """The version of a package, read without importing it; None if the package is missing."""
    try:
        return installed(name)
    except PackageNotFoundError:
        return None


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print the completion script of a shell.

    Parameters
    ----------
    shell
        bash reads it from ~/.local/share/bash-completion/completions/sagellm, zsh from _sagellm in
        a folder of fpath, fish from ~/.config/fish/completions/sagellm.fish.
    """
    script = APP.generate_completion(shell=shell)
    # Arguments such as GRAPH are paths: bash should complete file names if no option fits.
    print(script.replace("complete -F _sagellm", "complete -o default -F _sagellm"))
