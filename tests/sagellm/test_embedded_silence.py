"""A program that embeds sagellm sees no output of sagellm, unless it asks for logs."""

import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import warnings
warnings.simplefilter("always")
import sagellm
{ask}
from sagellm import Graph, Sampling, UnifiedInferenceClient, ops

graph = Graph("g").engine("g") >> ops.generate(engine="g")
with graph.open() as session:
    session.generate("secret prompt", sampling=Sampling(max_tokens=2))
"""


@pytest.mark.parametrize("ask", ["", 'sagellm.log("debug")'])
def test_nothing_is_said_unasked(ask: str) -> None:
    program = textwrap.dedent(PROGRAM).format(ask=ask)
    env = {**os.environ, "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=True)
    assert done.stdout == ""
    assert "secret prompt" not in done.stderr
    assert ('"event": "engine_opened"' in done.stderr) == bool(ask)
    assert ('"event": "request_ended"' in done.stderr) == bool(ask)
    assert bool(done.stderr) == bool(ask)
