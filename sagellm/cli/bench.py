"""`sagellm bench`: measurements that live in the repository, beside what they compare with."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

import sagellm
from sagellm.cli.failure import Failure

ROOT = Path(sagellm.__file__).resolve().parent.parent


def decide(*tokens: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Measure the CPU time of deciding, a request and a token.

    Parameters
    ----------
    tokens
        Options of the measurement; `sagellm bench decide -- --help` lists them.
    """
    return _plainly("benchmarks.decide", tokens)


def engine(*tokens: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Measure the engine against transformers and this machine's limits.

    In a process of its own: the number of threads must be set before torch is loaded.

    Parameters
    ----------
    tokens
        Options of the measurement; `sagellm bench engine -- --help` lists them.
    """
    return _with_threads("benchmarks.engine", tokens)


def peers(*tokens: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Measure the engine beside llama.cpp, OpenVINO, vLLM and transformers.

    Each gets an environment of its own under .venv-peers, made when it is first needed.

    Parameters
    ----------
    tokens
        Options of the measurement; `sagellm bench peers -- --help` lists them.
    """
    return _with_threads("benchmarks.peers.measure", tokens)


def processes(*tokens: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Measure executor `processes` beside `tasks`.

    Parameters
    ----------
    tokens
        Options of the measurement; `sagellm bench processes -- --help` lists them.
    """
    return _plainly("benchmarks.processes", tokens)


def size(*tokens: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Measure tokens a second over batch and context: JSON, and a plot.

    Parameters
    ----------
    tokens
        Options of the measurement; `sagellm bench size -- --help` lists them.
    """
    return _with_threads("benchmarks.size", tokens)


def gateway(*tokens: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Measure what the gateway costs a request and an event, beside the bare server.

    Parameters
    ----------
    tokens
        Options of the measurement; `sagellm bench gateway -- --help` lists them.
    """
    return _plainly("benchmarks.gateway.measure", tokens)


def _plainly(module: str, tokens: Sequence[str]) -> int:
    _check_repository()
    command = [sys.executable, "-m", module, *tokens]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def _with_threads(module: str, tokens: Sequence[str]) -> int:
    """Run it in a process whose libraries know the number of threads from the start."""
    _check_repository()
    chosen = _chosen_threads(tokens)
    threads = chosen or os.environ.get("OMP_NUM_THREADS") or "2"
    options = tokens if chosen else (*tokens, "--threads", threads)
    command = [sys.executable, "-m", module, *options]
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


def _check_repository() -> None:
    if not (ROOT / "benchmarks" / "engine.py").is_file():
        cause = "the benchmarks are in the repository, not in the installed package"
        raise Failure(cause, "clone the repository and type `make bench` there")


def _chosen_threads(tokens: Sequence[str]) -> str | None:
    """What `--threads 4` or `--threads=4` says."""
    for token, following in zip(tokens, (*tokens, "")[1:], strict=True):
        name, equals, value = token.partition("=")
        if name == "--threads":
            return value if equals else following
    return None
