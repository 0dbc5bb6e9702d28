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


def engine(*tokens: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Measure the engine against transformers and this machine's limits.

    In a process of its own: the number of threads must be set before torch is loaded.

    Parameters
    ----------
    tokens
        Options of the measurement; `sagellm bench engine -- --help` lists them.
    """
    _check_repository()
    chosen = _chosen_threads(tokens)
    threads = chosen or os.environ.get("OMP_NUM_THREADS") or "2"
    options = tokens if chosen else (*tokens, "--threads", threads)
    command = [sys.executable, "-m", "benchmarks.engine", *options]
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


def gateway(*tokens: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Measure what the gateway costs a request and an event, beside the bare server.

    Parameters
    ----------
    tokens
        Options of the measurement; `sagellm bench gateway -- --help` lists them.
    """
    _check_repository()
    command = [sys.executable, "-m", "benchmarks.gateway.measure", *tokens]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


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
