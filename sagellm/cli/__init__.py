"""The command line: `sagellm run | serve | chat | complete | graph | bench | ...`."""

import sys
from collections.abc import Sequence
from contextlib import suppress

from cyclopts import App, Parameter

from sagellm.cli.failure import explain, show
from sagellm.cli.version import sagellm_version
from sagellm.logs import command_logs

HELP = """LLM serving as a dataflow: one graph from a prompt to tokens.

Exit codes: 0 done, 1 something failed, 2 your configuration, 3 resources, 130 interrupted,
143 terminated."""

APP = App(
    name="sagellm", help=HELP, version=sagellm_version, default_parameter=Parameter(negative=())
)
APP.command("sagellm.cli.run:run", name="run", help="Answer a prompt, or a file of them.")
APP.command("sagellm.cli.serve:serve", name="serve", help="Serve a graph to OpenAI clients.")
APP.command("sagellm.cli.chat:chat", name="chat", help="Talk to a model on any server.")
APP.command("sagellm.cli.remote:complete", name="complete", help="What follows a text.")
APP.command("sagellm.cli.workers:ps", name="ps", help="Who works for the graphs that run.")
APP.command("sagellm.cli.workers:restart", name="restart", help="Replace an operator's workers.")
APP.command("sagellm.cli.workers:drain", name="drain", help="Give a worker nothing new.")
APP.command("sagellm.cli.workers:scale", name="scale", help="Have more or fewer replicas.")
APP.command("sagellm.cli.replay:run", name="replay", help="Decide again what a log says.")
APP.command("sagellm.cli.secrets:keys", name="keys", help="Make keys for links over a network.")
APP.command("sagellm.cli.doctor:doctor", name="doctor", help="Check this machine and set-up.")
APP.command("sagellm.cli.version:version", name="version", help="List installed versions.")
APP.command("sagellm.cli.completion:completion", name="completion", help="Print a shell's script.")

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
BENCH.command("sagellm.cli.bench_serve:serve", name="serve", help="Load on any server.")
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
        show(failure)
        return failure.code
    return code if isinstance(code, int) else 0
