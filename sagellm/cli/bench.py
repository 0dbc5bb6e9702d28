"""`sagellm bench`: measurements that live in the repository, beside what they compare with."""

import os
import subprocess
import sys
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
    if not (ROOT / "benchmarks" / "engine.py").is_file():
        cause = "the benchmarks are in the repository, not in the installed package"
        raise Failure(cause, "clone the repository and type `make bench` there")
    command = [sys.executable, "-m", "benchmarks.engine", *tokens]
    threads = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **threads}, check=False).returncode
